// AdamW's step (https://arxiv.org/abs/1711.05101) of all of a model's float32 parameters as one pass over memory, with the factor that
// clips the gradients; and the norm of those. Built by kernels.py with nothing but a C++ compiler; plain loops that it turns into vectors.
//
// A table's gradient may be that of some of its rows. A row that never had one has moments of zero, and its step is the decay alone: its
// moments are not read.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace {

constexpr int64_t TOGETHER = 16384, SUMMED = 256;  // numbers of one thread's turn; of a sum in float

struct Share {  // of a parameter: numbers, or rows where there are places
    int64_t parameter, begin, end;
};

// Moments of rows that are not met again become denormal numbers and would stay so: each costs a CPU a hundred cycles. They are zeros here.
class NoDenormals {
#ifdef __SSE__
  public:
    NoDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~NoDenormals() { _mm_setcsr(before_); }

  private:
    unsigned before_;
#else
  public:
    NoDenormals() {}
#endif
};

}  // namespace

struct Parameter {
    float *weight, *average, *square_average;  // [rows, width]; the gradient's, and its square's
    const float* gradient;                     // the same, or the rows that have one
    const int32_t* places;                     // [rows]: which row of `gradient` is each one's, -1: none; null: the gradient is whole
    uint8_t* still;                            // [rows]: 1 while both averages are zeros; null without `places`
    int64_t rows, width, gradient_rows;
    float kept, rate, correction;  // what the decay leaves; learning rate / (1 - beta1^t); 1 / sqrt(1 - beta2^t)
};

namespace {

std::vector<Share> shares_of(const Parameter* parameters, int64_t number) {
    std::vector<Share> shares;
    for (int64_t i = 0; i < number; ++i) {
        const bool by_rows = parameters[i].places != nullptr;
        const int64_t whole = by_rows ? parameters[i].rows : parameters[i].rows * parameters[i].width;
        const int64_t step = by_rows ? std::max<int64_t>(1, TOGETHER / parameters[i].width) : TOGETHER;
        for (int64_t begin = 0; begin < whole; begin += step) shares.push_back({i, begin, std::min(whole, begin + step)});
    }
    return shares;
}

struct Step {
    float clip, of_average, of_square, epsilon;
    // numbers from `at` of a parameter; gradient null: zeros
    void operator()(const Parameter& its, int64_t at, int64_t number, const float* gradient) const {
        float *weight = its.weight + at, *average = its.average + at, *square = its.square_average + at;
        const float clip = this->clip, of_average = this->of_average, of_square = this->of_square, epsilon = this->epsilon;
        const float kept = its.kept, rate = its.rate, correction = its.correction;
        const auto update = [=](int64_t i, float g) __attribute__((always_inline)) {
            const float first = average[i] + (g - average[i]) * of_average;
            const float second = square[i] + (g * g - square[i]) * of_square;
            average[i] = first;
            square[i] = second;
            weight[i] = weight[i] * kept - rate * first / (std::sqrt(second) * correction + epsilon);
        };
        if (gradient != nullptr) {
#pragma omp simd
            for (int64_t i = 0; i < number; ++i) update(i, gradient[i] * clip);
        } else {
#pragma omp simd
            for (int64_t i = 0; i < number; ++i) update(i, 0.0f);
        }
    }
};

}  // namespace

// The sum of the squares of all gradients; the same however many threads there are.
extern "C" double danlu_gradient_squares(const Parameter* parameters, int64_t number) {
    std::vector<Share> shares;
    for (int64_t i = 0; i < number; ++i) {
        const int64_t whole = parameters[i].gradient_rows * parameters[i].width;
        for (int64_t begin = 0; begin < whole; begin += TOGETHER) shares.push_back({i, begin, std::min(whole, begin + TOGETHER)});
    }
    std::vector<double> sums(shares.size());
#pragma omp parallel for schedule(dynamic)
    for (int64_t turn = 0; turn < int64_t(shares.size()); ++turn) {
        const float* gradient = parameters[shares[turn].parameter].gradient;
        double total = 0;
        for (int64_t begin = shares[turn].begin; begin < shares[turn].end; begin += SUMMED) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = begin; i < std::min(shares[turn].end, begin + SUMMED); ++i) sum += gradient[i] * gradient[i];
            total += sum;
        }
        sums[turn] = total;
    }
    double total = 0;
    for (const double sum : sums) total += sum;
    return total;
}

// One step; gradients are multiplied by `clip` first. of_average: 1 - beta1; of_square: 1 - beta2.
extern "C" void danlu_adamw(const Parameter* parameters, int64_t number, float clip, float of_average, float of_square,
                            float epsilon) {
    const std::vector<Share> shares = shares_of(parameters, number);
    const Step step{clip, of_average, of_square, epsilon};
#pragma omp parallel
    {
        const NoDenormals here;
#pragma omp for schedule(dynamic)
        for (int64_t turn = 0; turn < int64_t(shares.size()); ++turn) {
            const Share& share = shares[turn];
            const Parameter& its = parameters[share.parameter];
            if (its.places == nullptr) {
                step(its, share.begin, share.end - share.begin, its.gradient + share.begin);
                continue;
            }
            for (int64_t row = share.begin; row < share.end; ++row) {
                if (its.places[row] >= 0) {
                    its.still[row] = 0;
                    step(its, row * its.width, its.width, its.gradient + its.places[row] * its.width);
                } else if (!its.still[row]) {
                    step(its, row * its.width, its.width, nullptr);
                } else if (its.kept != 1) {
                    float* weight = its.weight + row * its.width;
                    const float kept = its.kept;
#pragma omp simd
                    for (int64_t i = 0; i < its.width; ++i) weight[i] *= kept;
                }
            }
        }
    }
}
