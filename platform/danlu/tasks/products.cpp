// The matrix products of an encoder layer's training step on a CPU with AMX: x @ W.T, its gradient of x, and its gradient of W in float.
// Built by kernels.py with nothing but a C++ compiler; plain pointers, no PyTorch headers.
//
// Matrices are multiplied in blocks of 32 x 32 of four tiles. A left tile is 16 rows of 32 numbers; a right tile 16 pairs of rows by 16
// columns, [16][16][2]. Weights are laid out in right tiles once for each step, straight from their float32.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

extern "C" int danlu_products_ready();

#if !defined(__AMX_BF16__) || !defined(__AVX512BF16__)
extern "C" int danlu_products_ready() { return 0; }
extern "C" void danlu_lay_out(const float*, int64_t, int64_t, int64_t, int64_t, uint16_t*, uint16_t*) { std::abort(); }
extern "C" void danlu_product(const uint16_t*, int64_t, int64_t, const uint16_t*, int64_t, const float*, uint16_t*) { std::abort(); }
extern "C" void danlu_weight_gradient(const uint16_t*, int64_t, const uint16_t*, int64_t, int64_t, float*) { std::abort(); }
#else

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t TILE = 16 * 32, ROWS = 128, CHUNK = 512;  // numbers of a tile; rows of x, and tokens of a sum, that are taken together

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
struct Tiles {
    Tiles() {
        static const TileShapes shapes;
        _tile_loadconfig(&shapes);
    }
    ~Tiles() { _tile_release(); }
};

// into [32, 32] (+)= two left tiles at each step, `below` apart, with rows of `stride` numbers, by two right tiles, `beside` apart.
inline void multiply(float* into, int64_t into_stride, bool add, const uint16_t* left, int64_t below, int64_t stride, int64_t left_step,
                     const uint16_t* right, int64_t beside, int64_t steps) {
    asm volatile("" ::: "memory");  // GCC does not say that a tile's load reads memory
    float* lower = into + 16 * into_stride;
    if (add) {
        _tile_loadd(0, into, into_stride * 4);
        _tile_loadd(1, into + 16, into_stride * 4);
        _tile_loadd(2, lower, into_stride * 4);
        _tile_loadd(3, lower + 16, into_stride * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step, left += left_step, right += TILE) {
        _tile_loadd(4, left, stride * 2);
        _tile_loadd(6, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + beside, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + below, stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, into, into_stride * 4);
    _tile_stored(1, into + 16, into_stride * 4);
    _tile_stored(2, lower, into_stride * 4);
    _tile_stored(3, lower + 16, into_stride * 4);
}

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

const __m512i PAIRS = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2,
                                       17, 1, 16, 0);
inline __m512i paired(__m256i one, __m256i other) {
    return _mm512_permutexvar_epi16(PAIRS, _mm512_inserti64x4(_mm512_castsi256_si512(one), other, 1));
}
inline __m256i rounded(const float* from) { return (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from)); }

// 32 rows by 16 columns of x (rows behind `there` are zeros) as 16 vectors of pairs of rows.
inline void pairs_of(const uint16_t* x, int64_t stride, int64_t there, __m512i* to) {
    const auto row = [&](int64_t t) { return t < there ? _mm256_loadu_si256((const __m256i*)(x + t * stride)) : _mm256_setzero_si256(); };
    for (int64_t t = 0; t < 32; t += 2) to[t / 2] = paired(row(t), row(t + 1));
}

class Room {  // of a thread; grows and stays
  public:
    uint16_t* of(int64_t numbers) {
        if (numbers > size_) {
            std::free(start_);
            start_ = static_cast<uint16_t*>(std::aligned_alloc(64, (numbers * 2 + 63) / 64 * 64));
            if (start_ == nullptr) std::abort();
            size_ = numbers;
        }
        return start_;
    }
    ~Room() { std::free(start_); }

  private:
    uint16_t* start_ = nullptr;
    int64_t size_ = 0;
};
thread_local Room room;

}  // namespace

// 1 if this process may use them: the system gives AMX to who asks.
extern "C" int danlu_products_ready() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

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
                last = room.of(32 * inner);
                std::memcpy(last, x + (end - rest) * inner, rest * inner * 2);
                std::memset(last + rest * inner, 0, (32 - rest) * inner * 2);
            }
            for (int64_t column = 0; column < columns; column += 32)
                for (int64_t row = top; row < end; row += 32) {
                    const int64_t number = std::min<int64_t>(32, end - row);
                    const uint16_t* left = number < 32 ? last : x + row * inner;
                    multiply(sums, 32, false, left, 16 * inner, inner, 32, right + column / 16 * beside, beside, inner / 32);
                    const __m512 first = bias ? _mm512_loadu_ps(bias + column) : _mm512_setzero_ps();
                    const __m512 second = bias ? _mm512_loadu_ps(bias + column + 16) : _mm512_setzero_ps();
                    for (int64_t i = 0; i < number; ++i) {
                        const __m512 one = _mm512_load_ps(sums + i * 32) + first, other = _mm512_load_ps(sums + i * 32 + 16) + second;
                        _mm512_storeu_si512(out + (row + i) * columns + column, (__m512i)_mm512_cvtne2ps_pbh(other, one));
                    }
                }
        }
    }
}

// into [outs, ins] = gradient [tokens, outs].T @ x [tokens, ins]
extern "C" void danlu_weight_gradient(const uint16_t* gradient, int64_t outs, const uint16_t* x, int64_t ins, int64_t tokens, float* into) {
    uint16_t* left = room.of((outs + ins) * CHUNK);
    uint16_t* right = left + outs * CHUNK;
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
                    multiply(into + out * ins + in, ins, start > 0, left + out / 16 * steps * TILE, steps * TILE, 32, TILE,
                             right + in / 16 * steps * TILE, steps * TILE, steps);
        }
    }
}
#endif
