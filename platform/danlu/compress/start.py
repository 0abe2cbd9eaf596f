"""A bundle as what a training starts from: its weights, or an adapter's merged into those of its base, as a model folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from danlu.artifact.bundle import FILE, Bundle, read_bundle
from danlu.artifact.merged import MERGED, MERGED_FROM, is_whole
from danlu.artifact.pretrained import FIELD
from danlu.artifact.store import Store
from danlu.artifact.uris import filesystem_of
from danlu.errors import ModelError, StorageError
from danlu.spec.train import TrainJob
from danlu.spec.tuning import Adapter, Qlora, VirtualTokens


def with_its_start(job: TrainJob) -> TrainJob:
    """The job with a folder or URI for its model where it names a bundle of its storage: of the version that an alias means now."""
    name = job.model.model_name_or_path
    if not job.model.is_bundle or Path(name).exists():
        return job
    if job.model.revision is not None:
        raise ModelError(f"{name} is a bundle, which has versions and no revisions", where="model.revision", fix="leave it out; NAME@v1")
    store = Store(job.storage if "://" in job.storage else str(Path(job.storage).expanduser().resolve()))
    try:
        bundle = read_bundle(store.resolve(name))
    except ModelError as error:
        raise ModelError(error.problem, where=FIELD, fix=error.fix) from error
    if (rounded := bundle.meta.quantization) is not None:
        told = f"{name} has weights of fewer bits ({rounded.kind}), which cannot be trained further"
        raise ModelError(told, where=FIELD, fix="the version that it was made from")
    if bundle.meta.weights == "full":
        start = f"{store.uri}/bundles/{bundle.meta.name}/v{bundle.meta.version:04d}/model"
    else:
        start = _merged(bundle, f"{store.uri}/{MERGED}/{bundle.meta.name}-{bundle.meta.digest[:16]}")
    return job.model_copy(update={"model": job.model.model_copy(update={"model_name_or_path": start})})


def started_from(model: str) -> str | None:
    """The digest of the bundle whose weights a model's folder or URI holds; None if they are no bundle's."""
    if model.startswith("pkg://"):
        return None
    filesystem, path = filesystem_of(model)
    folder = path.rstrip("/")
    for file in (f"{folder}/{MERGED_FROM}", f"{folder.removesuffix('/model')}/{FILE}"):
        if filesystem.exists(file):
            return str(json.loads(filesystem.cat_file(file))["digest"])
    return None


def _merged(bundle: Bundle, uri: str) -> str:
    """Where an adapter's merged weights are, once they are: what they were merged from is written last."""
    if is_whole(uri):
        return uri
    filesystem, path = filesystem_of(uri)
    with tempfile.TemporaryDirectory(prefix="danlu-merged-") as temporary:
        folder = Path(temporary)
        _write(bundle, folder)
        try:
            filesystem.makedirs(path, exist_ok=True)
            for file in sorted(folder.iterdir()):
                filesystem.put_file(str(file), f"{path}/{file.name}")
            said = {"name": bundle.meta.name, "version": bundle.meta.version, "digest": bundle.meta.digest}
            filesystem.pipe_file(f"{path}/{MERGED_FROM}", json.dumps(said).encode())
        except OSError as error:
            raise StorageError(f"cannot write: {error}", where=uri, fix="free some space, or set storage: to another place") from error
    return uri


def _write(bundle: Bundle, folder: Path) -> None:
    """A model folder of the merged weights, with the bundle's tokenizer, chat template and defaults."""
    from danlu.compress.load import load_base, load_model

    tuning = bundle.meta.tuning
    if isinstance(tuning, VirtualTokens | Adapter):
        told = f"what tuning.kind={tuning.kind} has learned for {bundle.meta.name} stands beside the weights and cannot become part of them"
        raise ModelError(told, where=FIELD, fix="a bundle of full, freeze, lora, qlora, adalora or ia3")
    if isinstance(tuning, Qlora):
        from peft import PeftModel

        # Its weights of fewer bits, as float32: what the adapter was trained on.
        base = load_base(bundle).dequantize().float()
        model = PeftModel.from_pretrained(base, bundle.path / "model").merge_and_unload()
    else:
        model = load_model(bundle)
    model.save_pretrained(folder)
    for file in (bundle.path / "model").iterdir():
        if file.is_file() and not file.name.startswith("adapter_") and file.name != "README.md":
            shutil.copy(file, folder / file.name)
