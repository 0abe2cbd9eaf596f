// The matrix products of an encoder layer's training step on a CPU with AMX: x @ W.T, its gradient of x, and its gradient of W in float.
// Built by kernels.py with nothing but a C++ compiler; plain pointers, no PyTorch headers.
//
// Matrices are multiplied in blocks of 32 x 32 of four tiles. A left tile is 16 rows of 32 numbers; a right tile 16 pairs of rows by 16
// columns, [16][16][2]. Weights are laid out in right tiles once for each step, straight from their float32.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "blocks.h"

extern "C" int danlu_products_ready();

#if !defined(__AMX_BF16__) || !defined(__AVX512BF16__)
extern "C" int danlu_products_ready() { return 0; }
extern "C" void danlu_lay_out(const float*, int64_t, int64_t, int64_t, int64_t, uint16_t*, uint16_t*) { std::abort(); }
extern "C" void danlu_product(const uint16_t*, int64_t, int64_t, const uint16_t*, int64_t, const float*, uint16_t*) { std::abort(); }
extern "C" void danlu_product_add(const uint16_t*, int64_t, int64_t, const uint16_t*, int64_t, float*) { std::abort(); }
extern "C" void danlu_product_gelu(const uint16_t*, int64_t, int64_t, const uint16_t*, int64_t, const float*, uint16_t*, uint16_t*) { std::abort(); }
extern "C" void danlu_product_gelu_backward(const uint16_t*, int64_t, int64_t, const uint16_t*, int64_t, const uint16_t*, uint16_t*, float*) { std::abort(); }
extern "C" void danlu_weight_gradient(const uint16_t*, int64_t, const uint16_t*, int64_t, int64_t, float*) { std::abort(); }
#else

namespace {

constexpr int64_t TILE = 16 * 32, ROWS = 64, CHUNK = 256;  // numbers of a tile; rows of x, and tokens of a sum, that are taken together

void transpose(__m512i* r) {  // 16 x 16 numbers of 32 bits
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
        }
    for (int j = 0; j < 4; ++j) {
        const __m512i even = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), odd = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
        const __m512i even_below = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88), odd_below = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
        r[j] = _mm512_shuffle_i32x4(even, even_below, 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(even, even_below, 0xdd);
        r[4 + j] = _mm512_shuffle_i32x4(odd, odd_below, 0x88);
        r[12 + j] = _mm512_shuffle_i32x4(odd, odd_below, 0xdd);
    }
}

inline __m256i rounded(const float* from) { return (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from)); }

// 32 rows by 16 columns of x (rows behind `there` are zeros) as 16 vectors of pairs of rows.
inline void pairs_of(const uint16_t* x, int64_t stride, int64_t there, __m512i* to) {
    const auto row = [&](int64_t t) { return t < there ? _mm256_loadu_si256((const __m256i*)(x + t * stride)) : _mm256_setzero_si256(); };
    for (int64_t t = 0; t < 32; t += 2) to[t / 2] = paired(row(t), row(t + 1));
}

// A normal variable's probability to be below x, and `bell` = exp(-x^2 / 2): Abramowitz and Stegun 7.1.26, within 1e-7.
inline __m512 below(__m512 x, __m512& bell) {
    const __m512 one = _mm512_set1_ps(1.0f), at = one + _mm512_abs_ps(x) * (0.3275911f * 0.70710678f);
    __m512 t = _mm512_rcp14_ps(at);
    t = t * (2.0f - at * t);
    bell = exponential(x * x * -0.5f);
    const __m512 tail = bell * t * (0.127414796f + t * (-0.142248368f + t * (0.7107068705f + t * (-0.7265760135f + t * 0.5307027145f))));
    return _mm512_mask_sub_ps(tail, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ), one, tail);
}

// x [rows, inner] @ the right tiles, of so many columns: `finish` has blocks, 32 columns of up to 32 rows, as the sums [32][32].
// `fetched` [rows, columns] is a matrix that it reads, if any: its lines are a row apart, too far for the CPU to foresee them.
template <typename Read, typename Finish>
void each_block(const uint16_t* x, int64_t rows, int64_t inner, const uint16_t* right, int64_t columns, const Read* fetched, Finish finish) {
    const int64_t beside = inner / 32 * TILE;
#pragma omp parallel
    {
        const Tiles tiles;
        alignas(64) float sums[32 * 32];
#pragma omp for schedule(dynamic)
        for (int64_t top = 0; top < rows; top += ROWS) {
            const int64_t end = std::min(rows, top + ROWS), rest = (end - top) % 32;
            uint16_t* last = nullptr;  // rows that do not fill a tile
            if (rest) {
                room.reserve(32 * inner * 2);
                last = room.take<uint16_t>(32 * inner);
                std::memcpy(last, x + (end - rest) * inner, rest * inner * 2);
                std::memset(last + rest * inner, 0, (32 - rest) * inner * 2);
            }
            for (int64_t column = 0; column < columns; column += 32)
                for (int64_t row = top; row < end; row += 32) {
                    const int64_t number = std::min<int64_t>(32, end - row);
                    const uint16_t* left = number < 32 ? last : x + row * inner;
                    for (int64_t i = 0; fetched != nullptr && i < number; ++i)
                        for (size_t line = 0; line < 32 * sizeof(Read); line += 64)
                            _mm_prefetch((const char*)(fetched + (row + i) * columns + column) + line, _MM_HINT_T0);
                    multiply(sums, 32, false, {left, inner, 16 * inner, 32}, {right + column / 16 * beside, 32, beside, TILE}, inner / 32);
                    finish(row, number, column, sums);
                }
        }
        _mm_sfence();
    }
}

constexpr const uint16_t* NOTHING = nullptr;

struct Bias {  // of 32 columns
    Bias(const float* from, int64_t column)
        : first(from ? _mm512_loadu_ps(from + column) : _mm512_setzero_ps()), second(from ? _mm512_loadu_ps(from + column + 16) : _mm512_setzero_ps()) {}
    __m512i added(const float* sums) const { return in_bf16(_mm512_load_ps(sums) + first, _mm512_load_ps(sums + 16) + second); }
    __m512 first, second;
};

}  // namespace

// 1 if this process may use them: the system gives AMX to who asks.
extern "C" int danlu_products_ready() { return lent_tiles(); }

// Weights [outs, ins], which are the outputs from `first` of all_outs, in right tiles of W.T (`forward`: [all_outs / 16][ins / 32]) and of
// W (`backward`: [ins / 16][all_outs / 32]).
extern "C" void danlu_lay_out(const float* weight, int64_t outs, int64_t ins, int64_t first, int64_t all_outs, uint16_t* forward,
                              uint16_t* backward) {
#pragma omp parallel for
    for (int64_t out = 0; out < outs; out += 32)
        for (int64_t in = 0; in < ins; in += 32) {
            for (int64_t half = 0; half < 32; half += 16) {
                __m512i rows[16];
                for (int64_t i = 0; i < 16; ++i) {
                    const float* from = weight + (out + half + i) * ins + in;
                    rows[i] = _mm512_inserti64x4(_mm512_castsi256_si512(rounded(from)), rounded(from + 16), 1);
                }
                transpose(rows);
                uint16_t* to = forward + ((first + out + half) / 16 * (ins / 32) + in / 32) * TILE;
                for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 32, rows[i]);
                to = backward + ((in + half) / 16 * (all_outs / 32) + (first + out) / 32) * TILE;
                for (int64_t i = 0; i < 16; ++i) {
                    const float* from = weight + (out + 2 * i) * ins + in + half;
                    _mm512_storeu_si512(to + i * 32, paired(rounded(from), rounded(from + ins)));
                }
            }
        }
}

// out [rows, columns] = x [rows, inner] @ the right tiles + bias [columns], which may be null.
extern "C" void danlu_product(const uint16_t* x, int64_t rows, int64_t inner, const uint16_t* right, int64_t columns, const float* bias,
                              uint16_t* out) {
    each_block(x, rows, inner, right, columns, NOTHING, [=](int64_t row, int64_t number, int64_t column, const float* sums) {
        const Bias its(bias, column);
        for (int64_t i = 0; i < number; ++i) stream(out + (row + i) * columns + column, its.added(sums + i * 32));
    });
}

// into [rows, columns] += x @ the right tiles
extern "C" void danlu_product_add(const uint16_t* x, int64_t rows, int64_t inner, const uint16_t* right, int64_t columns, float* into) {
    each_block(x, rows, inner, right, columns, into, [=](int64_t row, int64_t number, int64_t column, const float* sums) {
        for (int64_t i = 0; i < number; ++i)
            for (int64_t j = 0; j < 32; j += 16) {
                float* to = into + (row + i) * columns + column + j;
                _mm512_storeu_ps(to, _mm512_loadu_ps(to) + _mm512_load_ps(sums + i * 32 + j));
            }
    });
}

// out = x @ the right tiles + bias, and active = GELU(out)
extern "C" void danlu_product_gelu(const uint16_t* x, int64_t rows, int64_t inner, const uint16_t* right, int64_t columns, const float* bias,
                                   uint16_t* out, uint16_t* active) {
    each_block(x, rows, inner, right, columns, NOTHING, [=](int64_t row, int64_t number, int64_t column, const float* sums) {
        const Bias its(bias, column);
        for (int64_t i = 0; i < number; ++i) {
            const __m512i made = its.added(sums + i * 32);
            stream(out + (row + i) * columns + column, made);
            const __m512 one = lower(made), other = upper(made);
            __m512 bell;
            stream(active + (row + i) * columns + column, in_bf16(one * below(one, bell), other * below(other, bell)));
        }
    });
}

// out = (gradient [rows, inner] @ the right tiles) * GELU'(at [rows, columns]); sums_out [columns] are its columns'.
extern "C" void danlu_product_gelu_backward(const uint16_t* gradient, int64_t rows, int64_t inner, const uint16_t* right, int64_t columns,
                                            const uint16_t* at, uint16_t* out, float* sums_out) {
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
    std::vector<float> parts(size_t(blocks * columns), 0.0f);  // added up in one order, whichever thread made which
    float* all = parts.data();
    each_block(gradient, rows, inner, right, columns, at, [=](int64_t row, int64_t number, int64_t column, const float* sums) {
        __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t i = 0; i < number; ++i) {
            const __m512i before = _mm512_loadu_si512(at + (row + i) * columns + column);
            const __m512 x[2] = {lower(before), upper(before)};
            __m512 made[2];
            for (int j = 0; j < 2; ++j) {
                __m512 bell;
                const __m512 share = below(x[j], bell);
                made[j] = _mm512_load_ps(sums + i * 32 + j * 16) * (share + x[j] * bell * 0.39894228f);
            }
            const __m512i rounded = in_bf16(made[0], made[1]);
            stream(out + (row + i) * columns + column, rounded);
            total[0] += lower(rounded);
            total[1] += upper(rounded);
        }
        for (int j = 0; j < 2; ++j) {
            float* to = all + row / ROWS * columns + column + j * 16;
            _mm512_storeu_ps(to, _mm512_loadu_ps(to) + total[j]);
        }
    });
    for (int64_t i = 0; i < columns; ++i) {
        float sum = 0;
        for (int64_t block = 0; block < blocks; ++block) sum += all[block * columns + i];
        sums_out[i] = sum;
    }
}

// into [outs, ins] = gradient [tokens, outs].T @ x [tokens, ins]
extern "C" void danlu_weight_gradient(const uint16_t* gradient, int64_t outs, const uint16_t* x, int64_t ins, int64_t tokens, float* into) {
    room.reserve((outs + ins) * CHUNK * 2);
    uint16_t *left = room.take<uint16_t>(outs * CHUNK), *right = room.take<uint16_t>(ins * CHUNK);
#pragma omp parallel
    {
        const Tiles tiles;
        __m512i pairs[16];
        for (int64_t start = 0; start < tokens; start += CHUNK) {
            const int64_t steps = (std::min(CHUNK, tokens - start) + 31) / 32;
#pragma omp for schedule(static) nowait
            for (int64_t step = 0; step < steps; ++step) {
                const int64_t token = start + step * 32;
                for (int64_t in = 0; in < ins; in += 16) {
                    pairs_of(x + token * ins + in, ins, tokens - token, pairs);
                    for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(right + (in / 16 * steps + step) * TILE + i * 32, pairs[i]);
                }
            }
#pragma omp for schedule(static)
            for (int64_t step = 0; step < steps; ++step) {
                const int64_t token = start + step * 32;
                for (int64_t out = 0; out < outs; out += 16) {
                    pairs_of(gradient + token * outs + out, outs, tokens - token, pairs);
                    transpose(pairs);
                    for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(left + (out / 16 * steps + step) * TILE + i * 32, pairs[i]);
                }
            }
#pragma omp for schedule(static)
            for (int64_t out = 0; out < outs; out += 32)
                for (int64_t in = 0; in < ins; in += 32)
                    multiply(into + out * ins + in, ins, start > 0, {left + out / 16 * steps * TILE, 32, steps * TILE, TILE},
                             {right + in / 16 * steps * TILE, 32, steps * TILE, TILE}, steps);
        }
    }
}
#endif
