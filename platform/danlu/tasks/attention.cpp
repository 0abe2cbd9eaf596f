// Attention of packed rows, forward and backward, for training in bf16 on a CPU that multiplies it (AVX512-BF16, and AMX where it is there).
// Built by kernels.py with nothing but a C++ compiler; plain pointers, no PyTorch headers.
//
// A unit of work is one row's key head with the query heads that share it: its scores never leave the core's cache. The forward keeps of
// each query the logarithm of its sum; the backward makes the weights again from it (the idea of https://arxiv.org/abs/2205.14135).
//
// Sums are float; weights and their gradients are rounded to bf16 before they are multiplied, as everywhere under autocast.
//
// Matrices are multiplied in blocks of 32 x 32, so rows are padded to 32 tokens and heads have a multiple of 32 numbers. An instruction
// takes the right factor's rows in pairs. Of a matrix M [tokens, dim] there are two such layouts:
//   paired  [tokens / 2][dim][2]              M itself on the right: two tokens beside each other
//   turned  [tokens / 16][dim / 2][16][2]     M transposed on the right: two numbers of a token beside each other

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <omp.h>

#include "blocks.h"

struct Attention {
    const uint16_t *query, *key, *value;  // bf16: token t, head h at [t * stride + h * dim]
    const uint16_t *out_gradient;         // [tokens, heads, dim]; backward only
    uint16_t *out, *out_rest;             // [tokens, heads, dim]: in bf16, and what is lost by that, which the backward needs
    float *log_sums;                      // [heads, tokens]
    uint16_t *query_gradient, *key_gradient, *value_gradient;
    const int32_t *starts;  // [rows + 1]
    int64_t rows, heads, key_heads, dim;
    int64_t query_stride, key_stride, value_stride;  // from token to token
    int64_t gradient_stride, key_gradient_stride;    // of the query's; of the key's and the value's
    int64_t causal, window;                          // window 0: none
    float scaling, dropout;
    uint64_t seed;
};

extern "C" int danlu_attention_ready();

#ifndef __AVX512BF16__
extern "C" int danlu_attention_ready() { return 0; }
extern "C" void danlu_attention(const Attention*) { std::abort(); }
extern "C" void danlu_attention_backward(const Attention*) { std::abort(); }
#else

namespace {

constexpr int64_t BLOCK = 32;
constexpr int64_t SPREAD = 32;  // behind a long line: lines a power of two apart would share a few lines of the cache

int64_t whole(int64_t length) { return (length + BLOCK - 1) / BLOCK * BLOCK; }

// ---------------------------------------------------------------------------------------------------------------- vectors

const __m512i COUNT = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);

inline uint32_t mixed(uint64_t x) {  // splitmix64
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return uint32_t((x ^ (x >> 31)) >> 32);
}
inline __m512i mixed(__m512i x) {  // lowbias32 of https://github.com/skeeto/hash-prospector, but for its last step: only high bits count
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32(0x7feb352d));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
    return _mm512_mullo_epi32(x, _mm512_set1_epi32(int32_t(0x846ca68bu)));
}
constexpr uint32_t APART = 0x9e3779b9u;  // of neighbouring keys

// Which weights stay: a function of the call's seed, the query (`its`) and the key, in whichever order they are asked for.
struct Dropout {
    explicit Dropout(const Attention& call)
        : on(call.dropout > 0), seed(call.seed), threshold(uint32_t(std::min(4294967295.0, double(call.dropout) * 4294967296.0))) {}
    uint32_t of_query(int64_t head, int64_t token) const { return mixed(seed + uint64_t(head) * 0x9e3779b97f4a7c15u + uint64_t(token) * 0xd1342543de82ef95u); }
    __mmask16 kept(__m512i sums) const { return _mm512_cmpge_epu32_mask(mixed(sums), _mm512_set1_epi32(int32_t(threshold))); }
    bool on;
    uint64_t seed;
    uint32_t threshold;
};

// ---------------------------------------------------------------------------------------------------------------- layouts

Left rows_of(const uint16_t* from, int64_t stride) { return {from, stride, 16 * stride, BLOCK}; }

struct Rows {  // a head's tokens of one row
    const uint16_t* from;
    int64_t stride, length, dim;
};

void copy(const Rows& rows, uint16_t* to) {  // [whole(length)][dim], zeros behind
    for (int64_t t = 0; t < rows.length; ++t)
        for (int64_t d = 0; d < rows.dim; d += 32) _mm512_storeu_si512(to + t * rows.dim + d, _mm512_loadu_si512(rows.from + t * rows.stride + d));
    std::memset(to + rows.length * rows.dim, 0, (whole(rows.length) - rows.length) * rows.dim * 2);
}

void pair(const uint16_t* from, int64_t tokens, int64_t dim, uint16_t* to) {
    for (int64_t t = 0; t < tokens; t += 2)
        for (int64_t d = 0; d < dim; d += 16) {
            const __m256i one = _mm256_loadu_si256((const __m256i*)(from + t * dim + d));
            const __m256i other = _mm256_loadu_si256((const __m256i*)(from + (t + 1) * dim + d));
            _mm512_storeu_si512(to + t * dim + d * 2, paired(one, other));
        }
}

void turn(const uint16_t* from, int64_t tokens, int64_t dim, uint16_t* to) {
    const __m512i every = _mm512_mullo_epi32(COUNT, _mm512_set1_epi32(int32_t(dim * 2)));
    for (int64_t t = 0; t < tokens; t += 16)
        for (int64_t d = 0; d < dim; d += 2, to += 32) _mm512_storeu_si512(to, _mm512_i32gather_epi32(every, from + t * dim + d, 1));
}

// A turned block of 32 tokens as a left factor: [dim][32].
void flatten(const uint16_t* turned, int64_t dim, uint16_t* to) {
    for (int64_t half = 0; half < 2; ++half)
        for (int64_t d = 0; d < dim; d += 2, turned += 32) {
            const __m512i both = _mm512_loadu_si512(turned);
            _mm256_storeu_si256((__m256i*)(to + d * 32 + half * 16), _mm512_cvtepi32_epi16(both));
            _mm256_storeu_si256((__m256i*)(to + (d + 1) * 32 + half * 16), _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
        }
}

// Lines of a head are a token's width apart, too far for the CPU to foresee them.
void fetch(const uint16_t* from, int64_t stride, int64_t tokens, int64_t dim) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t d = 0; d < dim; d += 32) _mm_prefetch((const char*)(from + t * stride + d), _MM_HINT_T1);
}

struct Unit {  // a row's key head
    Unit(const Attention& call, int64_t index)
        : key_head(index % call.key_heads), start(call.starts[index / call.key_heads]),
          length(call.starts[index / call.key_heads + 1] - start), padded(whole(length)) {}
    Rows rows(const uint16_t* from, int64_t stride, int64_t head, int64_t dim) const {
        return {from + start * stride + head * dim, stride, length, dim};
    }
    // Tokens from `top` of what a thread comes to next, BLOCK of them.
    void fetch_block(const Attention& call, int64_t top, bool backward) const {
        const int64_t tokens = std::min(BLOCK, length - top), groups = call.heads / call.key_heads, dim = call.dim, from = start + top;
        fetch(call.key + from * call.key_stride + key_head * dim, call.key_stride, tokens, dim);
        fetch(call.value + from * call.value_stride + key_head * dim, call.value_stride, tokens, dim);
        fetch(call.query + from * call.query_stride + key_head * groups * dim, call.query_stride, tokens, groups * dim);
        if (!backward) return;
        const int64_t at = (from * call.heads + key_head * groups) * dim;
        for (const uint16_t* its : {call.out_gradient, (const uint16_t*)call.out, (const uint16_t*)call.out_rest}) fetch(its + at, call.heads * dim, tokens, groups * dim);
    }
    int64_t key_head, start, length, padded;
};

// ---------------------------------------------------------------------------------------------------------------- forward

void forward(const Attention& call, const Unit& unit, const Unit& next) {
    const int64_t dim = call.dim, length = unit.length, padded = unit.padded, groups = call.heads / call.key_heads;
    const int64_t wide = padded + SPREAD;
    const Dropout dropout(call);
    room.reserve(padded * dim * 2 * 4 + BLOCK * dim * 6 + BLOCK * wide * 6 + 4096);
    uint16_t *plain = room.take<uint16_t>(padded * dim), *keys = room.take<uint16_t>(padded * dim), *values = room.take<uint16_t>(padded * dim);
    uint16_t *queries = room.take<uint16_t>(padded * dim), *weights = room.take<uint16_t>(BLOCK * wide);
    float *scores = room.take<float>(BLOCK * wide), *sums = room.take<float>(BLOCK * dim);
    copy(unit.rows(call.key, call.key_stride, unit.key_head, dim), plain);
    turn(plain, padded, dim, keys);
    copy(unit.rows(call.value, call.value_stride, unit.key_head, dim), plain);
    pair(plain, padded, dim, values);
    for (int64_t head = unit.key_head * groups; head < (unit.key_head + 1) * groups; ++head) {
        copy(unit.rows(call.query, call.query_stride, head, dim), queries);
        for (int64_t top = 0; top < length; top += BLOCK) {
            if (head % groups == 0) next.fetch_block(call, top, false);
            const int64_t end = call.causal ? std::min(padded, top + BLOCK) : padded;
            const int64_t begin = call.window ? std::max<int64_t>(0, top - call.window + 1) / BLOCK * BLOCK : 0;
            for (int64_t k = begin; k < end; k += BLOCK)
                multiply(scores + k, wide, false, rows_of(queries + top * dim, dim), {keys + k * dim, 32, 16 * dim, 16 * 32}, dim / 32);
            // Each step for all queries before the next: what one of them waits for in a row, the others have time for.
            const int64_t number = std::min(BLOCK, length - top);
            float tops[BLOCK], totals[BLOCK], inverse[BLOCK];
            for (int64_t i = 0; i < number; ++i) {
                float* from = scores + i * wide;
                const int64_t token = top + i, last = call.causal ? token + 1 : length;
                const int64_t first = call.window ? std::max<int64_t>(0, token - call.window + 1) : 0;
                for (int64_t k = begin; k < first; ++k) from[k] = -INFINITY;
                for (int64_t k = last; k < end; ++k) from[k] = -INFINITY;
                __m512 largest = _mm512_set1_ps(-INFINITY);
                for (int64_t k = begin; k < end; k += 16) largest = _mm512_max_ps(largest, _mm512_loadu_ps(from + k));
                tops[i] = _mm512_reduce_max_ps(largest) * call.scaling;
            }
            for (int64_t i = 0; i < number; ++i) {
                const float *from = scores + i * wide, top_score = tops[i];
                uint16_t* to = weights + i * wide;
                __m512 sum = _mm512_setzero_ps();
                if (dropout.on) {
                    const uint32_t its = dropout.of_query(head, unit.start + top + i) + uint32_t(begin) * APART;
                    __m512i place = _mm512_add_epi32(_mm512_mullo_epi32(COUNT, _mm512_set1_epi32(int32_t(APART))), _mm512_set1_epi32(int32_t(its)));
                    for (int64_t k = begin; k < end; k += 16) {
                        const __m512 weight = exponential(_mm512_loadu_ps(from + k) * call.scaling - top_score);
                        sum += weight;
                        store(to + k, _mm512_maskz_mov_ps(dropout.kept(place), weight));
                        place = _mm512_add_epi32(place, _mm512_set1_epi32(int32_t(APART * 16)));
                    }
                } else {
                    for (int64_t k = begin; k < end; k += 16) {
                        const __m512 weight = exponential(_mm512_loadu_ps(from + k) * call.scaling - top_score);
                        sum += weight;
                        store(to + k, weight);
                    }
                }
                totals[i] = _mm512_reduce_add_ps(sum);
            }
            for (int64_t i = number; i < BLOCK; ++i) std::memset(weights + i * wide + begin, 0, (end - begin) * 2);
            for (int64_t i = 0; i < number; ++i) {
                inverse[i] = 1.0f / (totals[i] * (1.0f - call.dropout));
                call.log_sums[head * call.starts[call.rows] + unit.start + top + i] = tops[i] + std::log(totals[i]);
            }
            for (int64_t d = 0; d < dim; d += BLOCK)
                multiply(sums + d, dim, false, rows_of(weights + begin, wide), {values + begin * dim + d * 2, dim * 2, 32, 32 * dim}, (end - begin) / 32);
            for (int64_t i = 0; i < number; ++i) {
                const int64_t at = ((unit.start + top + i) * call.heads + head) * dim;
                for (int64_t d = 0; d < dim; d += 32) {
                    const __m512 one = _mm512_loadu_ps(sums + i * dim + d) * inverse[i], other = _mm512_loadu_ps(sums + i * dim + d + 16) * inverse[i];
                    const __m512i out = in_bf16(one, other);
                    stream(call.out + at + d, out);
                    stream(call.out_rest + at + d, in_bf16(one - lower(out), other - upper(out)));
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------- backward

// Scores are made turned, [keys, queries]: sums over queries are then products of whole rows, and what a query has of its own is a vector.
void backward(const Attention& call, const Unit& unit, const Unit& next) {
    const int64_t dim = call.dim, length = unit.length, padded = unit.padded, groups = call.heads / call.key_heads;
    const int64_t wide = padded + SPREAD;
    const Dropout dropout(call);
    room.reserve(padded * dim * 2 * 9 + (padded * 2 + wide) * dim * 4 + BLOCK * wide * 6 + BLOCK * dim * 2 + BLOCK * BLOCK * 8 + padded * 12 + 8192);
    const auto matrix = [&] { return room.take<uint16_t>(padded * dim); };
    uint16_t *keys = matrix(), *values = matrix(), *keys_turned = matrix();
    uint16_t *plain = matrix(), *queries_turned = matrix(), *queries_paired = matrix(), *outs_turned = matrix(), *outs_paired = matrix();
    uint16_t *weights = room.take<uint16_t>(BLOCK * wide), *of_scores = room.take<uint16_t>(BLOCK * wide);
    uint16_t *of_scores_paired = room.take<uint16_t>(BLOCK * wide), *keys_left = room.take<uint16_t>(BLOCK * dim);
    float *of_keys = room.take<float>(padded * dim), *of_values = room.take<float>(padded * dim), *of_queries = room.take<float>(dim * wide);
    float *scores = room.take<float>(BLOCK * BLOCK), *of_weights = room.take<float>(BLOCK * BLOCK);
    float *log_sums = room.take<float>(padded), *alongs = room.take<float>(padded);
    int32_t* draws = room.take<int32_t>(padded);
    copy(unit.rows(call.key, call.key_stride, unit.key_head, dim), keys);
    turn(keys, padded, dim, keys_turned);
    copy(unit.rows(call.value, call.value_stride, unit.key_head, dim), values);
    const float scale = 1.0f / (1.0f - call.dropout);
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t head = unit.key_head * groups + g;
        copy(unit.rows(call.query, call.query_stride, head, dim), plain);
        turn(plain, padded, dim, queries_turned);
        pair(plain, padded, dim, queries_paired);
        const Rows outs = unit.rows(call.out_gradient, call.heads * dim, head, dim);
        copy(outs, plain);
        turn(plain, padded, dim, outs_turned);
        pair(plain, padded, dim, outs_paired);
        for (int64_t t = 0; t < padded; ++t) {
            __m512 along = _mm512_setzero_ps();
            const int64_t at = ((unit.start + t) * call.heads + head) * dim;
            for (int64_t d = 0; d < dim && t < length; d += 16)
                along += widened(plain + t * dim + d) * (widened(call.out + at + d) + widened(call.out_rest + at + d));
            alongs[t] = _mm512_reduce_add_ps(along);
            log_sums[t] = t < length ? call.log_sums[head * call.starts[call.rows] + unit.start + t] : 0.0f;
            draws[t] = int32_t(dropout.on ? dropout.of_query(head, unit.start + t) : 0);
        }
        std::memset(of_queries, 0, dim * wide * 4);
        for (int64_t top = 0; top < length; top += BLOCK) {  // keys
            if (g == 0) next.fetch_block(call, top, true);
            const int64_t begin = call.causal ? top : 0;
            const int64_t end = call.window ? std::min(padded, whole(top + BLOCK + call.window - 1)) : padded;
            for (int64_t q = begin; q < end; q += BLOCK) {
                multiply(scores, BLOCK, false, rows_of(keys + top * dim, dim), {queries_turned + q * dim, 32, 16 * dim, 16 * 32}, dim / 32);
                multiply(of_weights, BLOCK, false, rows_of(values + top * dim, dim), {outs_turned + q * dim, 32, 16 * dim, 16 * 32}, dim / 32);
                for (int64_t i = 0; i < BLOCK; ++i) {
                    const int64_t key = top + i;
                    const __m512i place = _mm512_set1_epi32(int32_t(uint32_t(key) * APART));
                    for (int64_t j = 0; j < BLOCK; j += 16) {
                        const int64_t query = q + j;
                        __mmask16 seen = key < length ? 0xffff : 0;
                        if (call.causal) {
                            const __m512i behind = _mm512_sub_epi32(_mm512_add_epi32(COUNT, _mm512_set1_epi32(int32_t(query))), _mm512_set1_epi32(int32_t(key)));
                            seen &= _mm512_cmpge_epi32_mask(behind, _mm512_setzero_si512());
                            if (call.window) seen &= _mm512_cmplt_epi32_mask(behind, _mm512_set1_epi32(int32_t(call.window)));
                        }
                        const __m512 score = _mm512_loadu_ps(scores + i * BLOCK + j) * call.scaling - _mm512_loadu_ps(log_sums + query);
                        const __m512 weight = _mm512_maskz_mov_ps(seen, exponential(score));
                        __m512 dropped = weight, gradient = _mm512_loadu_ps(of_weights + i * BLOCK + j);
                        if (dropout.on) {
                            const __mmask16 kept = dropout.kept(_mm512_add_epi32(_mm512_loadu_si512(draws + query), place));
                            dropped = _mm512_maskz_mov_ps(kept, weight * scale);
                            gradient = _mm512_maskz_mov_ps(kept, gradient * scale);
                        }
                        store(weights + i * wide + query, dropped);
                        store(of_scores + i * wide + query, weight * (gradient - _mm512_loadu_ps(alongs + query)) * call.scaling);
                    }
                }
            }
            const int64_t steps = (end - begin) / 32;
            for (int64_t d = 0; d < dim; d += BLOCK) {
                multiply(of_values + top * dim + d, dim, g > 0, rows_of(weights + begin, wide), {outs_paired + begin * dim + d * 2, dim * 2, 32, 32 * dim}, steps);
                multiply(of_keys + top * dim + d, dim, g > 0, rows_of(of_scores + begin, wide), {queries_paired + begin * dim + d * 2, dim * 2, 32, 32 * dim}, steps);
            }
            flatten(keys_turned + top * dim, dim, keys_left);
            pair(of_scores, BLOCK, wide, of_scores_paired);
            for (int64_t d = 0; d < dim; d += BLOCK)
                for (int64_t q = begin; q < end; q += BLOCK)
                    multiply(of_queries + d * wide + q, wide, true, rows_of(keys_left + d * 32, 32), {of_scores_paired + q * 2, wide * 2, 32, 0}, 1);
        }
        const __m512i every = _mm512_mullo_epi32(COUNT, _mm512_set1_epi32(int32_t(wide * 4)));
        for (int64_t t = 0; t < length; ++t) {
            uint16_t* to = call.query_gradient + (unit.start + t) * call.gradient_stride + head * dim;
            for (int64_t d = 0; d < dim; d += 32) {
                const float* from = of_queries + d * wide + t;
                stream(to + d, in_bf16(_mm512_i32gather_ps(every, from, 1), _mm512_i32gather_ps(every, from + 16 * wide, 1)));
            }
        }
    }
    for (int64_t t = 0; t < length; ++t) {
        const int64_t at = (unit.start + t) * call.key_gradient_stride + unit.key_head * dim;
        for (int64_t d = 0; d < dim; d += 32) {
            const float *of_key = of_keys + t * dim + d, *of_value = of_values + t * dim + d;
            stream(call.key_gradient + at + d, in_bf16(_mm512_loadu_ps(of_key), _mm512_loadu_ps(of_key + 16)));
            stream(call.value_gradient + at + d, in_bf16(_mm512_loadu_ps(of_value), _mm512_loadu_ps(of_value + 16)));
        }
    }
}

template <typename Run> void each_unit(const Attention& call, Run run) {
    const int64_t units = call.rows * call.key_heads;
#pragma omp parallel
    {
        const Tiles tiles;
        const int64_t together = std::max<int64_t>(1, units / (16 * omp_get_num_threads()));  // neighbours, mostly of one row
#pragma omp for schedule(dynamic, together)
        for (int64_t index = 0; index < units; ++index) run(call, Unit(call, index), Unit(call, std::min(index + 1, units - 1)));
        _mm_sfence();
    }
}

}  // namespace

// 1 if this process may use them: the system gives AMX to who asks.
extern "C" int danlu_attention_ready() {
#ifdef __AMX_BF16__
    return lent_tiles();
#else
    return 1;
#endif
}
extern "C" void danlu_attention(const Attention* call) { each_unit(*call, forward); }
extern "C" void danlu_attention_backward(const Attention* call) { each_unit(*call, backward); }
#endif
