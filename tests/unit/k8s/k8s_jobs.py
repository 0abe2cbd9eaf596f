"""The job that the tests here submit."""

from danlu.spec.train import TrainJob

JOB = TrainJob.model_validate(
    {
        "name": "topics",
        "model": {"model_name_or_path": "org/model"},
        "data": {"train": "s3://b/t.csv"},
        "storage": "s3://b/runs",
        "cluster": {"image": "registry/danlu:1"},
    }
)
