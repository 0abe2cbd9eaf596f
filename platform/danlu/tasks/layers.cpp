// What stands between an encoder layer's products in training: dropout + residual + LayerNorm, bias sums and GELU, forward and backward,
// each one pass over memory. Built by kernels.py with nothing but a C++ compiler; plain loops that it turns into vectors.
//
// Activations are bf16 (their bits), the residual stream and sums float.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <vector>

namespace {

using half = uint16_t;  // a bf16's bits

inline float wide(half x) {
    const uint32_t bits = uint32_t(x) << 16;
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}
inline half nearest(float x) {  // ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return half((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0u : rounded);
}

inline float exponential(float x) {  // Cephes' expf: within 2 ulp; for x <= 0
    x = std::max(x, -87.0f);
    const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return y * power;
}

// A normal variable's probability to be below x, and `bell` = exp(-x^2 / 2): Abramowitz and Stegun 7.1.26, within 1e-7.
inline float below(float x, float& bell) {
    const float t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * std::fabs(x));
    bell = exponential(-0.5f * x * x);
    const float tail = 0.5f * bell * t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    return x < 0 ? tail : 1.0f - tail;
}

struct Dropout {  // which numbers stay: a function of the call's seed, the row and the column
    Dropout(uint64_t seed, float share)
        : seed(seed), threshold(uint32_t(std::min(4294967295.0, double(share) * 4294967296.0))), scale(1.0f / (1.0f - share)) {}
    uint32_t of_row(int64_t row) const {  // splitmix64
        uint64_t x = seed + uint64_t(row) * 0x9e3779b97f4a7c15u;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
        return uint32_t((x ^ (x >> 31)) >> 32);
    }
    float factor(uint32_t of_row, int64_t column) const {  // lowbias32 of https://github.com/skeeto/hash-prospector
        uint32_t x = of_row + uint32_t(column) * 0x9e3779b9u;
        x = (x ^ (x >> 16)) * 0x7feb352du;
        x = (x ^ (x >> 15)) * 0x846ca68bu;
        x ^= x >> 16;
        return x >= threshold ? scale : 0.0f;
    }
    uint64_t seed;
    uint32_t threshold;
    float scale;
};

// Each thread's rows and sums of its own; sums [number] are added up in the threads' order, so that they come out the same each time.
template <typename Run> void by_rows(int64_t rows, int64_t number, float* sums, Run run) {
    std::vector<float> all(size_t(omp_get_max_threads()) * number, 0.0f);
    int threads = 1;
#pragma omp parallel
    {
        const int64_t thread = omp_get_thread_num(), share = (rows + omp_get_num_threads() - 1) / omp_get_num_threads();
#pragma omp single
        threads = omp_get_num_threads();
        for (int64_t row = thread * share, end = std::min(rows, row + share); row < end; ++row) run(row, all.data() + thread * number);
    }
    for (int64_t i = 0; i < number; ++i) {
        float sum = 0;
        for (int thread = 0; thread < threads; ++thread) sum += all[thread * number + i];
        sums[i] = sum;
    }
}

}  // namespace

struct Norm {
    const half* update;      // [tokens, width]
    const float* residual;   // [tokens, width]
    const float *weight, *bias;
    float *out, *normed, *scales;  // [tokens, width], the same before weight and bias, and [tokens]
    half* rounded;                 // `out` in bf16
    const float* out_gradient;     // of `out`; backward only
    const half* rounded_gradient;  // of `rounded`
    float* residual_gradient;
    half* update_gradient;
    float* sums;  // [3, width]: the gradients of weight, bias and of what was added to each row of `update`
    int64_t tokens, width;
    float epsilon, dropout;
    uint64_t seed;
};

// out = LayerNorm(residual + dropout(update))
extern "C" void danlu_norm(const Norm* call) {
    const int64_t width = call->width;
    const Dropout dropout(call->seed, call->dropout);
    const bool drops = call->dropout > 0;
    const float *weight = call->weight, *bias = call->bias;
#pragma omp parallel for
    for (int64_t row = 0; row < call->tokens; ++row) {
        const half* update = call->update + row * width;
        const float* residual = call->residual + row * width;
        float *out = call->out + row * width, *normed = call->normed + row * width;
        half* rounded = call->rounded + row * width;
        const uint32_t its = dropout.of_row(row);
        float sum = 0, squares = 0;
        if (drops) {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < width; ++i) sum += normed[i] = residual[i] + wide(update[i]) * dropout.factor(its, i);
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < width; ++i) sum += normed[i] = residual[i] + wide(update[i]);
        }
        const float mean = sum / float(width);
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; ++i) squares += (normed[i] - mean) * (normed[i] - mean);
        const float scale = 1.0f / std::sqrt(squares / float(width) + call->epsilon);
        call->scales[row] = scale;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            normed[i] = (normed[i] - mean) * scale;
            out[i] = normed[i] * weight[i] + bias[i];
            rounded[i] = nearest(out[i]);
        }
    }
}

extern "C" void danlu_norm_backward(const Norm* call) {
    const int64_t width = call->width;
    const Dropout dropout(call->seed, call->dropout);
    const bool drops = call->dropout > 0;
    const float* weight = call->weight;
    by_rows(call->tokens, 3 * width, call->sums, [&](int64_t row, float* sums) {
        const float *normed = call->normed + row * width, *of_out = call->out_gradient + row * width;
        const half* of_rounded = call->rounded_gradient + row * width;
        float* of_residual = call->residual_gradient + row * width;
        half* of_update = call->update_gradient + row * width;
        float *of_weight = sums, *of_bias = sums + width, *of_added = sums + 2 * width;
        float mean = 0, along = 0;
        const bool both = call->rounded_gradient != nullptr;
#pragma omp simd reduction(+ : mean, along)
        for (int64_t i = 0; i < width; ++i) {
            const float gradient = both ? of_out[i] + wide(of_rounded[i]) : of_out[i];
            of_bias[i] += gradient;
            of_weight[i] += gradient * normed[i];
            const float weighted = gradient * weight[i];
            of_residual[i] = weighted;
            mean += weighted;
            along += weighted * normed[i];
        }
        mean /= float(width);
        along /= float(width);
        const float scale = call->scales[row];
        const Dropout here = dropout;  // of which nobody else has the address, or the loop would not become vectors
        const uint32_t its = here.of_row(row);
        if (drops) {
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) {
                of_residual[i] = scale * (of_residual[i] - mean - normed[i] * along);
                of_update[i] = nearest(of_residual[i] * here.factor(its, i));
                of_added[i] += wide(of_update[i]);
            }
        } else {
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) {
                of_residual[i] = scale * (of_residual[i] - mean - normed[i] * along);
                of_update[i] = nearest(of_residual[i]);
                of_added[i] += wide(of_update[i]);
            }
        }
    });
}

// x, out: [tokens, width]
extern "C" void danlu_gelu(const half* x, half* out, int64_t tokens, int64_t width) {
#pragma omp parallel for
    for (int64_t row = 0; row < tokens; ++row)
#pragma omp simd
        for (int64_t i = row * width; i < (row + 1) * width; ++i) {
            float bell;
            out[i] = nearest(wide(x[i]) * below(wide(x[i]), bell));
        }
}

// `gradient` becomes that of x, in place; sums [width] are its columns'.
extern "C" void danlu_gelu_backward(const half* x, half* gradient, float* sums, int64_t tokens, int64_t width) {
    by_rows(tokens, width, sums, [&](int64_t row, float* its) {
        const half* from = x + row * width;
        half* to = gradient + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            float bell;
            const float at = wide(from[i]), share = below(at, bell);
            to[i] = nearest(wide(to[i]) * (share + at * bell * 0.39894228f));
            its[i] += wide(to[i]);
        }
    });
}

// The columns' sums of x [tokens, width].
extern "C" void danlu_sums(const half* x, float* sums, int64_t tokens, int64_t width) {
    by_rows(tokens, width, sums, [&](int64_t row, float* its) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) its[i] += wide(x[row * width + i]);
    });
}
