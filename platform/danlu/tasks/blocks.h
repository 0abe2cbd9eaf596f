// What training's kernels that multiply bf16 share: products of blocks of 32 x 32, vectors, numbers in pairs, and a thread's room.
//
// An instruction multiplies rows by pairs of rows: a right factor lies as [rows / 2][columns][2].
#pragma once

#ifdef __AVX512BF16__
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef __AMX_BF16__
// Linux lends a process the tiles' registers when it asks: https://docs.kernel.org/arch/x86/xstate.html
inline bool lent_tiles() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
#endif

// A thread that has one may multiply.
struct Tiles {
#ifdef __AMX_BF16__
    Tiles() {
        static const TileShapes shapes;
        _tile_loadconfig(&shapes);
    }
    ~Tiles() { _tile_release(); }
#else
    Tiles() {}  // so that it counts as used
#endif
};

// Of a left factor, 32 rows of 32 numbers at each step: rows are `stride` apart, the lower 16 of them `below` the upper, steps `step`.
struct Left {
    const uint16_t* from;
    int64_t stride, below, step;
};
// Of a right factor, 16 pairs of rows of 32 columns at each step: pairs are `stride` apart, the last 16 columns `beside` the first.
struct Right {
    const uint16_t* from;
    int64_t stride, beside, step;
};

// into [32, 32] (+)= left @ right, of so many steps.
inline void multiply(float* into, int64_t into_stride, bool add, Left left, Right right, int64_t steps) {
#ifdef __AMX_BF16__
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
    for (; steps > 0; --steps, left.from += left.step, right.from += right.step) {
        _tile_loadd(4, left.from, left.stride * 2);
        _tile_loadd(6, right.from, right.stride * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right.from + right.beside, right.stride * 2);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left.from + left.below, left.stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, into, into_stride * 4);
    _tile_stored(1, into + 16, into_stride * 4);
    _tile_stored(2, lower, into_stride * 4);
    _tile_stored(3, lower + 16, into_stride * 4);
#else
    for (int64_t top = 0; top < 32; top += 8) {
        float* its = into + top * into_stride;
        const uint16_t* rows = left.from + top / 16 * left.below + top % 16 * left.stride;
        __m512 sums[8][2];
        for (int i = 0; i < 8; ++i)
            for (int j = 0; j < 2; ++j) sums[i][j] = add ? _mm512_loadu_ps(its + i * into_stride + 16 * j) : _mm512_setzero_ps();
        for (int64_t step = 0; step < steps; ++step)
            for (int64_t pair = 0; pair < 16; ++pair) {
                const uint16_t* from = right.from + step * right.step + pair * right.stride;
                const __m512bh first = (__m512bh)_mm512_loadu_si512(from), last = (__m512bh)_mm512_loadu_si512(from + right.beside);
                for (int i = 0; i < 8; ++i) {
                    int32_t two;
                    std::memcpy(&two, rows + step * left.step + i * left.stride + pair * 2, 4);
                    const __m512bh all = (__m512bh)_mm512_set1_epi32(two);
                    sums[i][0] = _mm512_dpbf16_ps(sums[i][0], all, first);
                    sums[i][1] = _mm512_dpbf16_ps(sums[i][1], all, last);
                }
            }
        for (int i = 0; i < 8; ++i)
            for (int j = 0; j < 2; ++j) _mm512_storeu_ps(its + i * into_stride + 16 * j, sums[i][j]);
    }
#endif
}

inline __m512 exponential(__m512 x) {  // Cephes' expf: within 2 ulp; 0 where it is no normal number, which the CPU takes its time over
    const __m512 least = _mm512_set1_ps(-87.0f);
    const __mmask16 normal = _mm512_cmp_ps_mask(x, least, _CMP_GT_OQ);
    x = _mm512_max_ps(x, least);
    const __m512 n = _mm512_roundscale_ps(x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    __m512 y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    return _mm512_maskz_scalef_ps(normal, y * r * r + r + 1.0f, n);
}

inline __m512 widened(const uint16_t* from) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
}
inline void store(uint16_t* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }

inline __m512i in_bf16(__m512 one, __m512 other) { return (__m512i)_mm512_cvtne2ps_pbh(other, one); }  // 32 numbers
inline __m512 lower(__m512i both) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16); }
inline __m512 upper(__m512i both) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16); }

// Write a line, 64 bytes aligned, past the caches: more than they hold is written before it is read again, and its old numbers are not
// fetched first. A thread that did ends with _mm_sfence.
inline void stream(uint16_t* to, __m512i numbers) { _mm512_stream_si512((__m512i*)to, numbers); }

// The numbers of two rows beside each other.
inline __m512i paired(__m256i one, __m256i other) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                                           18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512(one), other, 1));
}

class Room {  // of a thread, for its matrices; grows and stays
  public:
    void reserve(int64_t bytes) {
        if (bytes > size_) {
            std::free(start_);
            start_ = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
            if (start_ == nullptr) std::abort();
            size_ = bytes;
        }
        next_ = start_;
    }
    template <typename T> T* take(int64_t number) {
        T* found = reinterpret_cast<T*>(next_);
        next_ += (number * int64_t(sizeof(T)) + 63) / 64 * 64;
        return found;
    }
    ~Room() { std::free(start_); }

  private:
    char *start_ = nullptr, *next_ = nullptr;
    int64_t size_ = 0;
};
thread_local Room room;

}  // namespace
#endif
