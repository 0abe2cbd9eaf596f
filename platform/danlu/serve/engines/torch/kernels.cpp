// A decoder's step on a CPU in one call: every product, norm, rotation and attention of all layers, without a way back to Python between
// them. Built by kernels.py with nothing but a C++ compiler; plain pointers, no PyTorch headers, so that it takes seconds. One file, longer
// than others here: one command builds it, and what it is built of is one key.
//
// T is float or bf16; sums are made in float, and what PyTorch would round to T between two operations is rounded here too. Where the CPU
// multiplies bf16 its instructions do: a few rows by vectors (AVX512-BF16), more by tiles (AMX). Elsewhere GCC's vector extensions become
// whatever the CPU has.
//
// A product's weights lie in panels of 32 outputs: float [outs / 32][ins][32]; bf16 [outs / 32][ins / 2][32][2]. Integers of 8 or 4 bits
// lie as `Expands` and `pack_int4` say; a sum of products with them is multiplied by its scale: of an output (8 bits), or of an output and
// a group of inputs (4 bits). They are whole numbers that a bf16 holds, so nothing is rounded on the way into a product.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <omp.h>
#include <thread>
#include <type_traits>
#include <vector>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef __SSE2__
#include <immintrin.h>
#endif
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512VBMI__) && defined(__linux__)
#define TILES 1
#else
#define TILES 0
#endif

namespace {

struct bf16 {
    uint16_t bits;
};

#ifdef __AVX512F__
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PANEL = 32;
constexpr int VECTORS = PANEL / LANES;
constexpr int ROWS = LANES == 16 ? 12 : 3;  // of a tile: its sums and its weights fit the registers
constexpr int KEYS = 16;

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_u __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec_u __attribute__((vector_size(4 * LANES), aligned(2)));
typedef uint16_t halves_u __attribute__((vector_size(2 * LANES), aligned(2)));
typedef int8_t bytes_u __attribute__((vector_size(LANES), aligned(1)));

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }

template <typename T> inline T rounded(float x);
template <> inline float rounded<float>(float x) { return x; }
template <> inline bf16 rounded<bf16>(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // ties to even
    return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest)};
}

inline vec load(const float* from) { return *reinterpret_cast<const vec_u*>(from); }
inline vec widened(bytes_u x) {
#ifdef __AVX512F__
    const ivec wide = (ivec)_mm512_cvtepi8_epi32((__m128i)x);
#elif defined(__AVX2__)
    const ivec wide = (ivec)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(__builtin_bit_cast(int64_t, x)));
#else
    const ivec wide = __builtin_convertvector(x, ivec);  // which GCC would do one by one there
#endif
    return __builtin_convertvector(wide, vec);
}
inline vec load(const int8_t* from) { return widened(*reinterpret_cast<const bytes_u*>(from)); }
inline vec load(const bf16* from) {
#ifdef __AVX512F__
    const uvec wide = (uvec)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
    const uvec wide = __builtin_convertvector(*reinterpret_cast<const halves_u*>(from), uvec);
#endif
    return (vec)(wide << 16);
}

inline halves_u nearest(vec x) {
#ifdef __AVX512BF16__
    return (halves_u)_mm512_cvtneps_pbh((__m512)x);
#else
    const uvec bits = (uvec)x, found = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? uvec{} + 0x7fc0 : found, halves_u);
#endif
}
inline void store(vec x, float* to) { *reinterpret_cast<vec_u*>(to) = x; }
inline void store(vec x, bf16* to) { *reinterpret_cast<halves_u*>(to) = nearest(x); }

// As a T holds it, still as float.
template <typename T> inline vec kept(vec x) {
    if constexpr (std::is_same<T, float>::value) return x;
    const halves_u halves = nearest(x);
    return load(reinterpret_cast<const bf16*>(&halves));
}

// All lanes by join(one, other), in halves.
template <int HALF = LANES / 2, typename Join> inline float folded(vec x, Join join) {
    if constexpr (HALF == 0) {
        return x[0];
    } else {
        ivec other;
        for (int i = 0; i < LANES; ++i) other[i] = (i + HALF) % LANES;
        return folded<HALF / 2>(join(x, __builtin_shuffle(x, other)), join);
    }
}
inline vec larger(vec a, vec b) { return a > b ? a : b; }
inline float sum_of(vec x) {
    return folded(x, [](vec a, vec b) { return a + b; });
}

// Cephes' expf: within 2 ulp.
template <typename F> inline F exponential_of_rest(F r) {
    F y = 1.9875691500e-4f * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    return y * r * r + r + 1.0f;
}
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    return exponential_of_rest(x - n * 0.693359375f + n * 2.12194440e-4f) * __builtin_bit_cast(float, (int32_t(n) + 127) << 23);
}
inline vec exponential(vec x) {
#ifdef __AVX512F__
    const __m512 n = _mm512_roundscale_ps((__m512)x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (vec)_mm512_scalef_ps((__m512)exponential_of_rest(x - (vec)n * 0.693359375f + (vec)n * 2.12194440e-4f), n);
#else
    const vec high = vec{} + 88.0f;
    x = larger(x, vec{} - 87.0f);
    x = x > high ? high : x;
    const vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    return exponential_of_rest(x - n * 0.693359375f + n * 2.12194440e-4f) * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
#endif
}

// Grows and never shrinks: memory that is new in every step would be zeroed by the kernel in every step.
template <typename T> T* room(std::vector<char>& held, int64_t size) {
    const size_t bytes = size * sizeof(T) + 64;
    if (held.size() < bytes) held.resize(bytes);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(held.data()) + 63) / 64 * 64);
}

// ---------------------------------------------------------------------------------------------------------------- tiles

constexpr int64_t TILE_ROWS = 16;
constexpr int64_t TILE_INS = 32;  // of bf16: 64 bytes

#if TILES
// Linux lends a process the tiles' registers when it asks: https://docs.kernel.org/arch/x86/xstate.html
const bool HAS_TILES = [] {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}();

thread_local int64_t shaped_for = 0;  // rows of x; 0: not shaped

// Tiles 0 to 3 hold sums, two blocks of rows by two of 16 outputs; 4 and 5 the rows' numbers, 6 and 7 the outputs' weights.
inline void shape_tiles(int64_t rows) {
    if (rows == shaped_for) return;
    struct alignas(64) {
        uint8_t palette = 1, start = 0, unused[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } shapes;
    const uint8_t upper = uint8_t(std::min(rows, TILE_ROWS)), lower = uint8_t(std::max<int64_t>(1, rows - TILE_ROWS)), all = TILE_ROWS;
    const uint8_t of_tiles[8] = {upper, upper, lower, lower, upper, lower, all, all};
    std::memcpy(shapes.rows, of_tiles, sizeof of_tiles);
    for (int i = 0; i < 8; ++i) shapes.row_bytes[i] = 64;
    std::atomic_signal_fence(std::memory_order_seq_cst);  // GCC does not see that the instruction reads all of them
    _tile_loadconfig(&shapes);
    shaped_for = rows;
}

// Whoever has the thread next (oneDNN) shapes its own, and a thread that holds none is switched faster.
inline void give_back_tiles() {
    if (shaped_for) _tile_release();
    shaped_for = 0;
}
#else
constexpr bool HAS_TILES = false;
inline void give_back_tiles() {}
#endif

// ---------------------------------------------------------------------------------------------------------------- threads

inline void relax() {
#ifdef __SSE2__
    _mm_pause();
#endif
}

// A number that threads raise and wait for. Who waits looks for as long as another may well be busy with what it has begun, and then sleeps:
// where others use the machine too, the one to wait for may be waiting for this CPU.
class Signal {
  public:
    int32_t value() const { return value_.load(); }
    int32_t add(int32_t number) { return value_.fetch_add(number) + number; }
    void wake() {
#ifdef __linux__
        if (asleep_.load()) syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, std::numeric_limits<int>::max(), nullptr, nullptr, 0);
#endif
    }
    template <typename Reached> void wait(Reached reached) {
        constexpr int LOOKS = 1000;  // of some 50 ns
        for (int look = 0; look < LOOKS; ++look, relax())
            if (reached(value_.load())) return;
        asleep_.fetch_add(1);
        for (int32_t seen; !reached(seen = value_.load());) {
#ifdef __linux__
            syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
            std::this_thread::sleep_for(std::chrono::microseconds(50));
#endif
        }
        asleep_.fetch_sub(1);
    }

  private:
    std::atomic<int32_t> value_{0}, asleep_{0};
};

// The threads that help one that calls. OpenMP's look for milliseconds for their next work, on a CPU that the server's other threads need
// between two steps.
class Crew {
  public:
    ~Crew() { dismiss(); }

    // job(thread) on so many threads, the caller's own among them.
    void run(int32_t threads, const std::function<void(int32_t)>& job) {
        if (int32_t(helpers_.size()) != threads - 1) hire(threads - 1);
        job_ = &job;
        const int32_t all = done_.value() + threads - 1;
        call();
        job(0);
        done_.wait([all](int32_t value) { return value == all; });
    }

  private:
    void call() {
        calls_.add(1);
        calls_.wake();
    }

    void hire(int32_t number) {
        dismiss();
        for (int32_t i = 0; i < number; ++i)
            helpers_.emplace_back([this, i, heard = calls_.value()]() mutable {
                while (true) {
                    calls_.wait([heard](int32_t value) { return value != heard; });
                    ++heard;
                    if (!job_) return;
                    (*job_)(i + 1);
                    done_.add(1);
                    done_.wake();
                }
            });
    }

    void dismiss() {
        job_ = nullptr;
        call();
        for (auto& one : helpers_) one.join();
        helpers_.clear();
    }

    Signal calls_, done_;
    const std::function<void(int32_t)>* job_ = nullptr;
    std::vector<std::thread> helpers_;
};

inline Crew& own_crew() {
    static thread_local Crew crew;
    return crew;
}

struct Phase {
    alignas(64) std::atomic<int32_t> taken{0};  // of its units
    alignas(64) Signal done;                    // of its units and those of the phases behind it, up to one that is waited for
};

// Threads take a phase's units as they come free: on a machine that others use too, the fast one does more. They wait for units, not for
// each other: a thread that has none to finish holds nobody up.
class Team {
  public:
    Team(Phase* phases, int32_t thread, int32_t threads) : thread(thread), threads(threads), next_(phases) {}

    const int32_t thread, threads;

    // run(unit), or run(unit, the one that this thread will probably run after it). Nobody waits at its end: for what the next phase does
    // not read.
    template <typename Run> void hand_out(int64_t units, Run run) {
        const int64_t grain = std::max<int64_t>(1, units / (threads * 8));
        std::atomic<int32_t>& taken = (next_++)->taken;
        for (int64_t start; (start = taken.fetch_add(int32_t(grain), std::memory_order_relaxed)) < units;) {
            const int64_t end = std::min(units, start + grain);
            for (int64_t unit = start; unit < end; ++unit)
                if constexpr (std::is_invocable<Run, int64_t, int64_t>::value)
                    run(unit, std::min(unit + 1 < end ? unit + 1 : start + threads * grain, units - 1));
                else
                    run(unit);
            open_->done.add(int32_t(end - start));
            open_->done.wake();
        }
        owed_ += int32_t(units);
    }

    // And ends when the units of the phases before it, which nobody has waited for, are done too.
    template <typename Run> void share(int64_t units, Run run) {
        hand_out(units, run);
        open_->done.wait([this](int32_t value) { return value == owed_; });
        open_ = next_;
        owed_ = 0;
    }

  private:
    Phase *next_, *open_ = next_;  // the first that nobody has waited for, and the units since
    int32_t owed_ = 0;
};

template <typename Run> void in_parallel(int64_t phases, Run run) {
    std::vector<Phase> own(phases);
    const int32_t threads = omp_get_max_threads();
    own_crew().run(threads, [&](int32_t thread) {
        Team team(own.data(), thread, threads);
        run(team);
        give_back_tiles();
    });
}

// ---------------------------------------------------------------------------------------------------------------- products

struct Weight {
    const void* values;
    const void* scales = nullptr;  // 8 bits: float [panels * 32]; 4 bits: bf16 [panels][groups][32]
    int64_t bits = 0, group = 0;   // 0 bits: numbers of T
};

// Outputs of a product that LoRA adapters change, by their ranks side by side.
struct Part {
    const void* up;                   // [outs, ranks], in panels
    int64_t first_panel, stop_panel;  // of the product's outputs
    int64_t first_rank, ranks;        // of the product's; the first is a panel's first
};

struct Lora {
    const void* down;        // [rank, ins], in panels
    int64_t rank;            // 0: no adapter changes this product
    const int64_t* owners;   // [rank]: whose each is; of a token: its adapter, or -1
    const uint64_t* present;  // of each panel of ranks: bit `owner % 64` of all owners
    const Part* parts;
    int64_t num_parts;
};

struct Linear {
    Weight weight;
    const void* bias;
    int64_t outs, ins;
    Lora lora;
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define EXPANDS 1
#else
#define EXPANDS 0
#endif

// Whether integers become pairs of bf16 for the CPU's instruction; else they become floats, one input at a time.
template <typename T> constexpr bool Expands = EXPANDS && std::is_same<T, bf16>::value;

// Inputs that one multiply_once takes.
template <typename T, typename W> constexpr int STEP = std::is_same<T, float>::value || (std::is_same<W, int8_t>::value && !Expands<T>) ? 1 : 2;

template <int R> inline void multiply_once(const float* x, int64_t stride, const float* w, vec (&sums)[R][VECTORS]) {
    vec weights[VECTORS];
    for (int v = 0; v < VECTORS; ++v) weights[v] = load(w + v * LANES);
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v) sums[r][v] += weights[v] * x[r * stride];
}

template <int R> inline void multiply_once(const bf16* x, int64_t stride, const bf16* w, vec (&sums)[R][VECTORS]) {
#ifdef __AVX512BF16__
    __m512bh weights[VECTORS];
    for (int v = 0; v < VECTORS; ++v) weights[v] = (__m512bh)_mm512_loadu_si512(w + 2 * v * LANES);
    for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, x + r * stride, 4);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = (vec)_mm512_dpbf16_ps((__m512)sums[r][v], both, weights[v]);
    }
#else
    uvec weights[VECTORS];
    for (int v = 0; v < VECTORS; ++v) weights[v] = *reinterpret_cast<const uvec_u*>(w + 2 * v * LANES);
    for (int r = 0; r < R; ++r) {
        const float even = to_float(x[r * stride]), odd = to_float(x[r * stride + 1]);
        for (int v = 0; v < VECTORS; ++v) sums[r][v] += (vec)(weights[v] << 16) * even + (vec)(weights[v] & 0xffff0000u) * odd;
    }
#endif
}

template <typename T, int R> inline void multiply_floats(const T* x, int64_t stride, const vec (&weights)[VECTORS], vec (&sums)[R][VECTORS]) {
    for (int r = 0; r < R; ++r) {
        const float one = to_float(x[r * stride]);
        for (int v = 0; v < VECTORS; ++v) sums[r][v] += weights[v] * one;
    }
}

#if EXPANDS
template <int R> inline void multiply_pairs(const bf16* x, int64_t stride, const __m512i (&weights)[VECTORS], vec (&sums)[R][VECTORS]) {
    for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, x + r * stride, 4);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = (vec)_mm512_dpbf16_ps((__m512)sums[r][v], both, (__m512bh)weights[v]);
    }
}

// The bytes of the bf16 that are 0, 1, ... 127: an integer's magnitude finds both, its sign is the bf16's.
struct Magnitudes {
    alignas(64) uint8_t low[128], high[128];
    constexpr Magnitudes() : low(), high() {
        for (int i = 1; i < 128; ++i) {
            int exponent = 0;
            while (i >> (exponent + 1)) ++exponent;
            const int bits = (127 + exponent) << 7 | ((i << (7 - exponent)) & 127);
            low[i] = uint8_t(bits);
            high[i] = uint8_t(bits >> 8);
        }
    }
};
constexpr Magnitudes MAGNITUDES;

inline void expand(const int8_t* w, __m512i (&weights)[VECTORS]) {
    const __m512i bytes = _mm512_loadu_si512(w);
    const auto found = [&](const uint8_t* table) {
        return _mm512_permutex2var_epi8(_mm512_load_si512(table), bytes, _mm512_load_si512(table + 64));
    };
    const __m512i low = found(MAGNITUDES.low);
    const __m512i high = _mm512_ternarylogic_epi32(found(MAGNITUDES.high), bytes, _mm512_set1_epi8(-128), 0xf8);  // a | (b & c)
    weights[0] = _mm512_unpacklo_epi8(low, high);
    weights[1] = _mm512_unpackhi_epi8(low, high);
}

// The j-th of the four integers of 4 bits in each word.
inline __m512i expand_word(__m512i words, int j) {
    // -8 ... 7 as bf16, twice: the instruction reads five bits of a word.
    const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, short(0xc100),
        short(0xc0e0), short(0xc0c0), short(0xc0a0), short(0xc080), short(0xc040), short(0xc000), short(0xbf80)));
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * j), table);
}
#endif

template <int R, typename T> inline void multiply_once(const T* x, int64_t stride, const int8_t* w, vec (&sums)[R][VECTORS]) {
#if EXPANDS
    if constexpr (Expands<T>) {
        __m512i weights[VECTORS];
        expand(w, weights);
        multiply_pairs<R>(x, stride, weights, sums);
        return;
    }
#endif
    vec weights[VECTORS];
    for (int v = 0; v < VECTORS; ++v) weights[v] = load(w + v * LANES);
    multiply_floats<T, R>(x, stride, weights, sums);
}

// The panel that a thread multiplies after this one, which is fetched meanwhile: each of the tiles before fetches its share.
struct Ahead {
    const char* at = nullptr;
    int64_t pace = 0;  // bytes for each STEP
};

// What is read once, from `at` on. Into the second cache early and into the first one late: what a core may have asked for the first at one
// time is less than it takes to keep memory busy. Older CPUs, which have no AMX, read faster past the second.
template <typename W> inline void fetch_stream(const W* at, int64_t bytes) {
    const char* from = reinterpret_cast<const char*>(at);
    for (int64_t line = 0; line < bytes; line += 64) {
#ifdef __AMX_TILE__
        __builtin_prefetch(from + 8192 + line, 0, 2);
        __builtin_prefetch(from + 1024 + line, 0, 3);
#else
        __builtin_prefetch(from + 4096 + line, 0, 0);
#endif
    }
}

// R rows by one panel. Few rows have few sums, and one addition waits for the last: several sets take turns.
template <typename T, typename W, int R> void multiply_tile(const T* x, int64_t stride, const W* w, int64_t ins, float* out, Ahead ahead = {}) {
    constexpr int step = STEP<T, W>;
    constexpr int SETS = R <= 2 ? 4 : R <= 4 ? 2 : 1;
    vec sums[SETS][R][VECTORS] = {};
    int64_t k = 0;
    for (; k + SETS * step <= ins; k += SETS * step)
        for (int set = 0; set < SETS; ++set) {
            const W* at = w + (k + set * step) * PANEL;
            if (R <= 4)  // the weights come from memory, once
                fetch_stream(at, step * PANEL * sizeof(W));
            else
                for (int64_t line = 0; line < ahead.pace; line += 64) __builtin_prefetch(ahead.at + line, 0, 2);
            ahead.at += ahead.pace;
            multiply_once<R>(x + k + set * step, stride, at, sums[set]);
        }
    for (; k < ins; k += step) multiply_once<R>(x + k, stride, w + k * PANEL, sums[0]);
    for (int set = 1; set < SETS; ++set)
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < VECTORS; ++v) sums[0][r][v] += sums[set][r][v];
    std::memcpy(out, sums[0], sizeof sums[0]);
}

constexpr int BLOCK = 8;  // inputs whose integers of 4 bits lie together

// One block: as words of four, of which a table makes bf16; or as bytes of two.
template <typename T, int R, int SETS> inline void multiply_block(const T* x, int64_t stride, const uint8_t* w, vec (&sums)[SETS][R][VECTORS]) {
#if EXPANDS
    if constexpr (Expands<T>) {
        __m512i words[VECTORS];
        for (int v = 0; v < VECTORS; ++v) words[v] = _mm512_loadu_si512(w + 64 * v);
        for (int j = 0; j < 4; ++j) {
            __m512i weights[VECTORS];
            for (int v = 0; v < VECTORS; ++v) weights[v] = expand_word(words[v], j);
            multiply_pairs<R>(x + 2 * j, stride, weights, sums[j % SETS]);
        }
        return;
    }
#endif
    for (int j = 0; j < BLOCK; ++j) {
        vec weights[VECTORS];
        for (int v = 0; v < VECTORS; ++v) {
            const bytes_u both = *reinterpret_cast<const bytes_u*>(w + j / 2 * PANEL + v * LANES);
            weights[v] = widened((((j % 2 ? both >> 4 : both) & 15) ^ 8) - 8);
        }
        multiply_floats<T, R>(x + j, stride, weights, sums[j % SETS]);
    }
}

template <typename T, int R>
void multiply_tile(const T* x, int64_t stride, const uint8_t* w, const bf16* scales, int64_t ins, int64_t group, float* out) {
    constexpr int SETS = R <= 2 ? 4 : R <= 4 ? 2 : 1;
    vec totals[R][VECTORS] = {};
    for (int64_t first = 0; first < ins; first += group, scales += PANEL) {
        vec sums[SETS][R][VECTORS] = {};
        for (int64_t k = first; k < first + group; k += BLOCK) {
            const uint8_t* at = w + k * PANEL / 2;
            if (R <= 4) fetch_stream(at, BLOCK * PANEL / 2);
            multiply_block<T, R, SETS>(x + k, stride, at, sums);
        }
        for (int v = 0; v < VECTORS; ++v) {
            const vec scale = load(scales + v * LANES);
            for (int r = 0; r < R; ++r) {
                for (int set = 1; set < SETS; ++set) sums[0][r][v] += sums[set][r][v];
                totals[r][v] += sums[0][r][v] * scale;
            }
        }
    }
    std::memcpy(out, totals, sizeof totals);
}

// run(R) with R = rows as a constant.
template <int R = ROWS, typename Run> inline void with_rows(int64_t rows, Run run) {
    if (rows == R)
        run(std::integral_constant<int, R>());
    else if constexpr (R > 1)
        with_rows<R - 1>(rows, run);
}

// One panel of up to ROWS rows, by vectors.
template <typename T>
inline void multiply_by_vectors(int64_t rows, const T* x, int64_t stride, const Weight& weight, int64_t panel, int64_t ins, float* sums, Ahead ahead = {}) {
    const int64_t first = panel * ins * PANEL;
    with_rows(rows, [&](auto number) {
        constexpr int R = decltype(number)::value;
        if (weight.bits == 8) {
            multiply_tile<T, int8_t, R>(x, stride, static_cast<const int8_t*>(weight.values) + first, ins, sums);
            const float* scales = static_cast<const float*>(weight.scales) + panel * PANEL;
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < PANEL; ++i) sums[r * PANEL + i] *= scales[i];
        } else if (weight.bits == 4) {
            const bf16* scales = static_cast<const bf16*>(weight.scales) + first / weight.group;
            multiply_tile<T, R>(x, stride, static_cast<const uint8_t*>(weight.values) + first / 2, scales, ins, weight.group, sums);
        } else {
            multiply_tile<T, T, R>(x, stride, static_cast<const T*>(weight.values) + first, ins, sums, ahead);
        }
    });
}

#if TILES
// Up to 32 rows by one panel of bf16, of a multiple of TILE_INS inputs. weights.at(k): those of the inputs from k on; weights.between(k, 0 to
// 3): meanwhile, what gets the ones behind them ready.
template <bool IS_LOW, typename Weights> inline void multiply_tiles(const bf16* x, int64_t stride, Weights& weights, int64_t ins, float* sums) {
    constexpr int64_t PAIR = 2 * PANEL * sizeof(bf16);
    _tile_zero(0);
    _tile_zero(1);
    if (!IS_LOW) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < ins; k += TILE_INS) {
        const bf16* w = weights.at(k);
        weights.between(k, 0);
        _tile_loadd(6, w, PAIR);
        _tile_loadd(4, x + k, stride * sizeof(bf16));
        _tile_dpbf16ps(0, 4, 6);
        weights.between(k, 1);
        _tile_loadd(7, w + PANEL, PAIR);
        _tile_dpbf16ps(1, 4, 7);
        weights.between(k, 2);
        if (!IS_LOW) {
            _tile_loadd(5, x + TILE_ROWS * stride + k, stride * sizeof(bf16));
            _tile_dpbf16ps(2, 5, 6);
        }
        weights.between(k, 3);
        if (!IS_LOW) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, PANEL * sizeof(float));
    _tile_stored(1, sums + PANEL / 2, PANEL * sizeof(float));
    if (!IS_LOW) {
        _tile_stored(2, sums + TILE_ROWS * PANEL, PANEL * sizeof(float));
        _tile_stored(3, sums + TILE_ROWS * PANEL + PANEL / 2, PANEL * sizeof(float));
    }
}

// Of any number of inputs.
template <typename Weights> inline void multiply_by_tiles(int64_t rows, const bf16* x, int64_t stride, Weights& weights, int64_t ins, float* sums) {
    const int64_t whole = ins / TILE_INS * TILE_INS;
    shape_tiles(rows);
    if (rows <= TILE_ROWS)
        multiply_tiles<true>(x, stride, weights, whole, sums);
    else
        multiply_tiles<false>(x, stride, weights, whole, sums);
    if (whole == ins) return;
    const bf16* w = weights.at(whole);
    alignas(64) float rest[ROWS * PANEL];
    for (int64_t row = 0; row < rows; row += ROWS) {
        const int64_t some = std::min<int64_t>(ROWS, rows - row);
        multiply_by_vectors<bf16>(some, x + row * stride + whole, stride, Weight{w}, 0, ins - whole, rest);
        for (int64_t i = 0; i < some * PANEL; i += LANES) store(load(sums + row * PANEL + i) + load(rest + i), sums + row * PANEL + i);
    }
}

// GCC does not see that tiles are loaded from memory.
inline void before_tiles() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// Weights that tiles read where they lie, while a share of the next panel is fetched: all at once it would hold the tiles' own loads up.
struct Stored {
    const bf16* values;
    Ahead ahead;

    const bf16* at(int64_t k) {
        before_tiles();
        return values + k * PANEL;
    }
    void between(int64_t, int64_t quarter) {
        const int64_t bite = (ahead.pace + 255) / 256 * 64, stop = std::min(ahead.pace, (quarter + 1) * bite);
        for (int64_t line = quarter * bite; line < stop; line += 64) __builtin_prefetch(ahead.at + line, 0, 2);
        if (quarter == 3) ahead.at += ahead.pace;
    }
};

// A panel's integers of the inputs [start, stop) as the bf16 that they are, [inputs / 2][32][2]; or a copy of its bf16.
inline void make_bf16(const Weight& weight, const char* panel, int64_t start, int64_t stop, bf16* to) {
    const int64_t bits = weight.bits ? weight.bits : 16, bytes = (stop - start) * PANEL * bits / 8;
    const char* from = panel + start * PANEL * bits / 8;
    for (int64_t at = 0; at < bytes; at += 64)
        if (bits == 16) {
            _mm512_store_si512(to + at / 2, _mm512_loadu_si512(from + at));
        } else if (bits == 8) {
            __m512i pair[VECTORS];
            expand(reinterpret_cast<const int8_t*>(from + at), pair);
            for (int v = 0; v < VECTORS; ++v) _mm512_store_si512(to + at + v * PANEL, pair[v]);
        } else {
            for (int j = 0; j < BLOCK / 2; ++j)
                _mm512_store_si512(to + at / 128 * BLOCK * PANEL + j * 2 * PANEL + at % 128 / 64 * PANEL, expand_word(_mm512_loadu_si512(from + at), j));
        }
}

// Weights that are read once. Vectors bring them into the first cache while tiles multiply those before: tiles that wait for memory themselves
// keep it waiting too.
class Passing {
  public:
    // `next`: the panel that this thread reads after it.
    Passing(const Weight& weight, const char* panel, int64_t ins, const char* next) : weight_(weight), panel_(panel), next_(next ? next : panel), ins_(ins) { make(0, TILE_INS); }

    const bf16* at(int64_t k) {
        before_tiles();
        return room_[k / TILE_INS % 2];
    }
    void between(int64_t k, int64_t quarter) {
        constexpr int64_t BITE = TILE_INS / 4;
        k += TILE_INS;
        if (weight_.bits)  // takes longer than a copy
            make(k + quarter * BITE, k + (quarter + 1) * BITE);
        else if (!quarter)
            make(k, k + TILE_INS);
    }

  private:
    void make(int64_t start, int64_t stop) {
        stop = std::min(stop, ins_);
        if (start >= stop) return;
        const int64_t bits = weight_.bits ? weight_.bits : 16, each = PANEL * bits / 8;
        const char *far = behind(start * each + 8192), *near = behind(start * each + 1024);
        for (int64_t line = 0; line < (stop - start) * each; line += 64) {  // as fetch_stream does
            __builtin_prefetch(far + line, 0, 2);
            __builtin_prefetch(near + line, 0, 3);
        }
        make_bf16(weight_, panel_, start, stop, room_[start / TILE_INS % 2] + start % TILE_INS * PANEL);
    }
    const char* behind(int64_t place) const {
        const int64_t bytes = ins_ * PANEL * (weight_.bits ? weight_.bits : 16) / 8;
        return place < bytes ? panel_ + place : next_ + (place - bytes);
    }

    const Weight weight_;
    const char *panel_, *next_;
    const int64_t ins_;
    alignas(64) bf16 room_[2][TILE_INS * PANEL];  // no more: what is written 4096 bytes behind what is read holds that up
};

// Up to 32 rows by a panel of integers, whose weights are ready as bf16.
template <typename Weights>
inline void multiply_integers(int64_t rows, const bf16* x, int64_t stride, const Weight& weight, int64_t panel, int64_t ins, Weights& weights, float* sums) {
    if (weight.bits == 8) {
        multiply_by_tiles(rows, x, stride, weights, ins, sums);
        const float* scales = static_cast<const float*>(weight.scales) + panel * PANEL;
        for (int64_t r = 0; r < rows; ++r)
            for (int v = 0; v < PANEL; v += LANES) store(load(sums + r * PANEL + v) * load(scales + v), sums + r * PANEL + v);
        return;
    }
    struct Group {
        Weights& all;
        int64_t first;
        const bf16* at(int64_t k) { return all.at(first + k); }
        void between(int64_t k, int64_t quarter) { all.between(first + k, quarter); }
    };
    alignas(64) float found[2 * TILE_ROWS * PANEL];
    const bf16* scales = static_cast<const bf16*>(weight.scales) + panel * ins / weight.group * PANEL;
    std::fill(sums, sums + rows * PANEL, 0.0f);
    for (int64_t first = 0; first < ins; first += weight.group, scales += PANEL) {
        Group group{weights, first};
        multiply_by_tiles(rows, x + first, stride, group, weight.group, found);
        for (int v = 0; v < PANEL; v += LANES) {
            const vec scale = load(scales + v);
            for (int64_t r = 0; r < rows; ++r) store(load(sums + r * PANEL + v) + load(found + r * PANEL + v) * scale, sums + r * PANEL + v);
        }
    }
}
#endif

constexpr int64_t MOST_ROWS = TILES ? 2 * TILE_ROWS : ROWS;  // of a block that a panel is multiplied with at a time
constexpr int64_t FEW_ROWS = 4;                              // that vectors multiply as fast as their weights come from memory

template <typename T> inline bool goes_by_tiles(int64_t rows) { return TILES && HAS_TILES && std::is_same<T, bf16>::value && rows > FEW_ROWS; }

// One panel of weights, for the blocks of `rows` rows. A thread may have two at a time, `which` 0 and 1.
template <typename T> class Panel {
  public:
    Panel(const Weight& weight, int64_t panel, int64_t ins, int64_t rows, int which = 0)
        : weight_(weight), panel_(panel), ins_(ins), by_tiles_(goes_by_tiles<T>(rows)), is_read_once_(rows <= MOST_ROWS) {
#if TILES
        if (!by_tiles_) return;
        const int64_t bits = weight.bits ? weight.bits : 16;
        start_ = static_cast<const char*>(weight.values) + panel * ins * PANEL * bits / 8;
        if (weight.bits && !is_read_once_) {
            static thread_local std::vector<char> held[2];
            bf16* made = room<bf16>(held[which], ins * PANEL);
            for (int64_t k = 0; k < ins; k += BLOCK) {
                fetch_stream(start_ + k * PANEL * bits / 8, BLOCK * PANEL * bits / 8);
                make_bf16(weight, start_, k, std::min<int64_t>(k + BLOCK, ins), made + k * PANEL);
            }
            made_ = made;
        }
#endif
    }

    // A block of up to MOST_ROWS of them. Ahead: what is read next, if that lies in memory as this panel does.
    void multiply(int64_t rows, const T* x, int64_t stride, float* sums, Ahead ahead = {}) const {
#if TILES
        if constexpr (std::is_same<T, bf16>::value)
            if (by_tiles_) {
                if (is_read_once_ && (weight_.bits || ahead.at)) {
                    Passing weights(weight_, start_, ins_, ahead.at);
                    multiply(rows, x, stride, weights, sums);
                } else {
                    Stored weights{made_ ? made_ : reinterpret_cast<const bf16*>(start_), ahead};
                    multiply(rows, x, stride, weights, sums);
                }
                return;
            }
#endif
        multiply_by_vectors<T>(rows, x, stride, weight_, panel_, ins_, sums, ahead);
    }

  private:
#if TILES
    template <typename Weights> void multiply(int64_t rows, const bf16* x, int64_t stride, Weights& weights, float* sums) const {
        if (weight_.bits)
            multiply_integers(rows, x, stride, weight_, panel_, ins_, weights, sums);
        else
            multiply_by_tiles(rows, x, stride, weights, ins_, sums);
    }
#endif

    const Weight weight_;
    const int64_t panel_, ins_;
    const bool by_tiles_, is_read_once_;
    const char* start_ = nullptr;
    const bf16* made_ = nullptr;
};

// run(first row, number of rows, block, blocks): by tiles, as many as they hold; by vectors, blocks that are all about as high.
template <typename T, typename Run> inline void each_block(int64_t rows, Run run) {
    const bool by_tiles = goes_by_tiles<T>(rows);
    const int64_t most = by_tiles ? 2 * TILE_ROWS : ROWS, blocks = (rows + most - 1) / most;
    for (int64_t block = 0, row = 0, some; block < blocks; ++block, row += some) {
        some = by_tiles ? std::min(most, rows - row) : (rows - row + blocks - block - 1) / (blocks - block);
        run(row, some, block, blocks);
    }
}

// More blocks compute for longer than a panel takes to come, and asking for it costs more than it saves.
template <typename T> inline int64_t fetching_blocks(int64_t rows) { return goes_by_tiles<T>(rows) ? 16 : 4; }

// Of a panel that `blocks` blocks of `rows` rows in all fetch, the share of one.
template <typename T> inline Ahead share_of(const Weight& weight, int64_t panel, int64_t ins, int64_t rows, int64_t block, int64_t blocks) {
    if (weight.bits) return {static_cast<const char*>(weight.values) + panel * ins * PANEL * weight.bits / 8};
    if (blocks > fetching_blocks<T>(rows)) return {};
    const int64_t step = goes_by_tiles<T>(rows) ? TILE_INS : STEP<T, T>;
    const int64_t pace = (step * PANEL * int64_t(sizeof(T)) + blocks - 1) / blocks;
    return {static_cast<const char*>(weight.values) + panel * ins * PANEL * int64_t(sizeof(T)) + block * pace * (ins / step), pace};
}

// One panel of all rows, which lie `stride` apart, while `next` is fetched: more(row, number of rows, sums) adds to a block's sums, and
// finish(row, column, number of columns, sums) does what the product is for.
template <typename T, typename More, typename Finish>
inline void multiply_panel(const T* x, int64_t stride, int64_t rows, const Weight& weight, int64_t panel, int64_t next, int64_t outs, int64_t ins, More more, Finish finish) {
    alignas(64) float sums[MOST_ROWS * PANEL];
    const int64_t columns = std::min<int64_t>(PANEL, outs - panel * PANEL);
    const Panel<T> own(weight, panel, ins, rows);
    each_block<T>(rows, [&](int64_t row, int64_t some, int64_t block, int64_t blocks) {
        own.multiply(some, x + row * stride, stride, sums, share_of<T>(weight, next, ins, rows, block, blocks));
        more(row, some, sums);
        for (int64_t r = 0; r < some; ++r) finish(row + r, panel * PANEL, columns, sums + r * PANEL);
    });
}

template <typename T, typename Finish>
inline void multiply_panel(const T* x, int64_t stride, int64_t rows, const Weight& weight, int64_t panel, int64_t next, int64_t outs, int64_t ins, Finish finish) {
    multiply_panel(x, stride, rows, weight, panel, next, outs, ins, [](int64_t, int64_t, float*) {}, finish);
}

// Rows that lie a multiple of 4096 bytes apart push each other out of the cache.
template <typename T> inline int64_t apart(int64_t size) { return size + 64 / sizeof(T); }

inline int64_t panels(int64_t outs) { return (outs + PANEL - 1) / PANEL; }

// Numbers of a row: run(vector's place) for all whole vectors, run_one(place) for what is left.
template <typename Run, typename RunOne> inline void each_of(int64_t size, Run run, RunOne run_one) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) run(i);
    for (; i < size; ++i) run_one(i);
}

// A panel's sums as T: with their bias (null: none), or added to what is there.
template <typename T, bool ADDS> inline void put(const float* sums, const T* bias, int64_t columns, T* to) {
    each_of(
        columns,
        [&](int64_t i) {
            const vec own = bias ? load(sums + i) + load(bias + i) : load(sums + i);
            store(ADDS ? load(to + i) + kept<T>(own) : own, to + i);
        },
        [&](int64_t i) {
            const T own = rounded<T>(bias ? sums[i] + to_float(bias[i]) : sums[i]);
            to[i] = ADDS ? rounded<T>(to_float(to[i]) + to_float(own)) : own;
        });
}

template <typename T> inline const T* bias_of(const Linear& linear, int64_t first) {
    return linear.bias ? static_cast<const T*>(linear.bias) + first : nullptr;
}

// What the adapters of a step's tokens add to a product. Only those that have tokens are read.
template <typename T> class Adapted {
  public:
    Adapted() = default;
    // owners: of each row, null if none has an adapter; present: as Lora's. scratch: [rows, apart(rank)], written by `begin`.
    Adapted(const int64_t* owners, uint64_t present, T* scratch) : owners_(owners), present_(present), scratch_(scratch) {}

    // Before the product, where an adapter changes it. x: rows `apart`.
    void begin(Team& team, const Linear& linear, const T* x, int64_t rows) const {
        const Lora& lora = linear.lora;
        if (!owners_ || !lora.rank) return;
        const int64_t stride = apart<T>(linear.ins);
        team.share(panels(lora.rank), [&](int64_t panel, int64_t next) {
            if (!(lora.present[panel] & present_)) return;
            multiply_panel(x, stride, rows, Weight{lora.down}, panel, next, lora.rank, linear.ins, [&](int64_t row, int64_t first, int64_t n, const float* sums) {
                T* to = scratch_ + row * apart<T>(lora.rank) + first;
                const int64_t own = owners_[row];
                for (int64_t i = 0; i < n; ++i) to[i] = lora.owners[first + i] == own ? rounded<T>(sums[i]) : T{};
            });
        });
    }

    // To the sums of a panel and of `some` of all rows, from `row` on.
    void add(const Linear& linear, int64_t panel, int64_t row, int64_t some, int64_t rows, float* sums) const {
        const Part* part = part_of(linear, panel);
        if (!part) return;
        const int64_t stride = apart<T>(linear.lora.rank);
        for (int64_t start = 0, stop; start < part->ranks; start = stop) {
            for (stop = start; stop < part->ranks && is_read(linear.lora, part->first_rank + stop); stop += PANEL) continue;
            if (stop == start) {
                stop += PANEL;
                continue;
            }
            stop = std::min(stop, part->ranks);
            alignas(64) float own[MOST_ROWS * PANEL];
            const Panel<T> up(Weight{up_of(*part, panel) + start * PANEL}, 0, stop - start, rows);
            up.multiply(some, scratch_ + row * stride + part->first_rank + start, stride, own);
            for (int64_t i = 0; i < some * PANEL; i += LANES) store(load(sums + i) + load(own + i), sums + i);
        }
    }

    void fetch(const Linear& linear, int64_t panel) const {
        const Part* part = part_of(linear, panel);
        if (!part) return;
        const char* from = reinterpret_cast<const char*>(up_of(*part, panel));
        for (int64_t line = 0; line < part->ranks * PANEL * int64_t(sizeof(T)); line += 64) __builtin_prefetch(from + line, 0, 2);
    }

  private:
    bool is_read(const Lora& lora, int64_t rank) const { return lora.present[rank / PANEL] & present_; }
    static const T* up_of(const Part& part, int64_t panel) { return static_cast<const T*>(part.up) + (panel - part.first_panel) * part.ranks * PANEL; }
    const Part* part_of(const Linear& linear, int64_t panel) const {
        for (int64_t i = 0; owners_ && i < linear.lora.num_parts; ++i)
            if (const Part& part = linear.lora.parts[i]; part.first_panel <= panel && panel < part.stop_panel) return &part;
        return nullptr;
    }

    const int64_t* owners_ = nullptr;
    uint64_t present_ = 0;
    T* scratch_ = nullptr;
};

// y = x @ weight.T + bias, or added to y. x: rows `apart`.
template <typename T> void multiply(Team& team, const Linear& linear, const T* x, int64_t rows, T* y, bool adds, const Adapted<T>& adapted) {
    const int64_t stride = apart<T>(linear.ins);
    adapted.begin(team, linear, x, rows);
    team.share(panels(linear.outs), [&](int64_t panel, int64_t next) {
        adapted.fetch(linear, panel);
        const auto more = [&](int64_t row, int64_t some, float* sums) { adapted.add(linear, panel, row, some, rows, sums); };
        multiply_panel(x, stride, rows, linear.weight, panel, next, linear.outs, linear.ins, more, [&](int64_t row, int64_t first, int64_t n, const float* sums) {
            T* to = y + row * linear.outs + first;
            if (adds)
                put<T, true>(sums, bias_of<T>(linear, first), n, to);
            else
                put<T, false>(sums, bias_of<T>(linear, first), n, to);
        });
    });
}

// ---------------------------------------------------------------------------------------------------------------- the rest of a layer

template <typename T> void norm(const T* x, const T* weight, int64_t size, float eps, T* y) {
    vec sums = {};
    float rest = 0;
    each_of(size, [&](int64_t i) { const vec one = load(x + i); sums += one * one; }, [&](int64_t i) { rest += to_float(x[i]) * to_float(x[i]); });
    const float scale = 1.0f / std::sqrt((sum_of(sums) + rest) / float(size) + eps);
    each_of(
        size, [&](int64_t i) { store(kept<T>(load(x + i) * scale) * load(weight + i), y + i); },
        [&](int64_t i) { y[i] = rounded<T>(to_float(rounded<T>(to_float(x[i]) * scale)) * to_float(weight[i])); });
}

// Half of a head moves up, the other down, and the sign of what moves down stands in `sin`.
template <typename T> void rotate(const T* x, const T* cos, const T* sin, int64_t dim, T* y) {
    const int64_t half = dim / 2;
    each_of(
        half,
        [&](int64_t i) {
            const vec low = load(x + i), high = load(x + i + half);
            store(low * load(cos + i) + high * load(sin + i), y + i);
            store(high * load(cos + i + half) + low * load(sin + i + half), y + i + half);
        },
        [&](int64_t i) {
            const float low = to_float(x[i]), high = to_float(x[i + half]);
            y[i] = rounded<T>(low * to_float(cos[i]) + high * to_float(sin[i]));
            y[i + half] = rounded<T>(high * to_float(cos[i + half]) + low * to_float(sin[i + half]));
        });
}

// silu(gate) * up.
template <typename T> inline vec gated(vec gate, vec up) { return kept<T>(gate / (1.0f + exponential(-gate))) * up; }
template <typename T> inline T gated(float gate, float up) { return rounded<T>(to_float(rounded<T>(gate / (1.0f + exponential(-gate)))) * up); }

// silu(gate) * up of a product whose outputs are gates, then ups; returns the rows, `apart`: `wide`, or `x` where it goes by way of `wide`.
template <typename T> T* multiply_gated(Team& team, const Linear& linear, T* x, int64_t rows, T* wide, const Adapted<T>& adapted) {
    const int64_t size = linear.outs / 2, stride = apart<T>(linear.ins), to_stride = apart<T>(size);
    if (size % PANEL) {
        multiply(team, linear, x, rows, wide, false, adapted);
        team.share(rows, [&](int64_t t) {
            const T* from = wide + t * 2 * size;
            T* to = x + t * to_stride;
            each_of(
                size, [&](int64_t i) { store(gated<T>(load(from + i), load(from + size + i)), to + i); },
                [&](int64_t i) { to[i] = gated<T>(to_float(from[i]), to_float(from[size + i])); });
        });
        return x;
    }
    adapted.begin(team, linear, x, rows);
    team.share(panels(size), [&](int64_t panel, int64_t next) {
        const int64_t up = panels(size) + panel;
        adapted.fetch(linear, panel);
        adapted.fetch(linear, up);
        alignas(64) float gates[MOST_ROWS * PANEL], ups[MOST_ROWS * PANEL];
        const auto made = [&](const float* sums, const T* bias) { return kept<T>(bias ? load(sums) + load(bias) : load(sums)); };
        const T *gate_bias = bias_of<T>(linear, panel * PANEL), *up_bias = bias_of<T>(linear, size + panel * PANEL);
        const Panel<T> gate_panel(linear.weight, panel, linear.ins, rows), up_panel(linear.weight, up, linear.ins, rows, 1);
        each_block<T>(rows, [&](int64_t row, int64_t some, int64_t block, int64_t blocks) {
            const auto fetched = [&](int64_t which) { return share_of<T>(linear.weight, which, linear.ins, rows, block, blocks); };
            gate_panel.multiply(some, x + row * stride, stride, gates, fetched(next));
            up_panel.multiply(some, x + row * stride, stride, ups, fetched(panels(size) + next));
            adapted.add(linear, panel, row, some, rows, gates);
            adapted.add(linear, up, row, some, rows, ups);
            for (int64_t r = 0; r < some; ++r)
                for (int64_t i = 0; i < PANEL; i += LANES) {
                    const vec gate = made(gates + r * PANEL + i, gate_bias ? gate_bias + i : nullptr), up = made(ups + r * PANEL + i, up_bias ? up_bias + i : nullptr);
                    store(gated<T>(gate, up), wide + (row + r) * to_stride + panel * PANEL + i);
                }
        });
    });
    return wide;
}

template <typename T> inline float dot(const T* a, const T* b, int64_t size) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += to_float(a[i]) * to_float(b[i]);
    return sum;
}

#ifdef __AVX512F__
// The sums of 16 vectors as one vector.
inline __m512 sums_of(const __m512 (&x)[16]) {
    __m512 by2[8], by4[4], by8[2];
    for (int i = 0; i < 8; ++i) by2[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(by2[2 * i]), b = _mm512_castps_pd(by2[2 * i + 1]);
        by4[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; ++i)
        by8[i] = _mm512_add_ps(
            _mm512_shuffle_f32x4(by4[2 * i], by4[2 * i + 1], 0x88), _mm512_shuffle_f32x4(by4[2 * i], by4[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(by8[0], by8[1], 0x88), _mm512_shuffle_f32x4(by8[0], by8[1], 0xdd));
}

inline __m512 multiply_add(const float* a, const float* b, __m512 sum) { return _mm512_fmadd_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b), sum); }
#ifdef __AVX512BF16__
inline __m512 multiply_add(const bf16* a, const bf16* b, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
}
#else
inline __m512 multiply_add(const bf16* a, const bf16* b, __m512 sum) {
    sum = _mm512_fmadd_ps((__m512)load(a), (__m512)load(b), sum);
    return _mm512_fmadd_ps((__m512)load(a + 16), (__m512)load(b + 16), sum);
}
#endif
#endif

// Scores of `heads` queries and the keys [first, last): float [heads, last - first rounded up to KEYS].
template <typename T>
void score(const T* query, int64_t heads, const T* keys, const T* next, int64_t first, int64_t last, int64_t dim, float scale, float* scores) {
    const int64_t width = (last - first + KEYS - 1) / KEYS * KEYS;
#ifdef __AVX512F__
    constexpr int64_t BITE = 64 / sizeof(T);
    if (dim % BITE == 0) {
        for (int64_t key = first; key < last; key += KEYS) {
            const T* rows[KEYS];
            for (int64_t i = 0; i < KEYS; ++i) rows[i] = keys + std::min(key + i, last - 1) * dim;
            for (int64_t head = 0; head < heads; ++head) {
                __m512 sums[KEYS] = {};
                for (int64_t at = 0; at < dim; at += BITE) {
                    for (int64_t fetched = head; fetched < KEYS; fetched += heads) __builtin_prefetch(next + (key + fetched) * dim + at, 0, 2);
                    for (int64_t i = 0; i < KEYS; ++i) sums[i] = multiply_add(query + head * dim + at, rows[i] + at, sums[i]);
                }
                _mm512_storeu_ps(scores + head * width + key - first, _mm512_mul_ps(sums_of(sums), _mm512_set1_ps(scale)));
            }
        }
        return;
    }
#endif
    for (int64_t key = first; key < last; ++key)
        for (int64_t head = 0; head < heads; ++head) scores[head * width + key - first] = scale * dot(query + head * dim, keys + key * dim, dim);
}

// H heads' weighted sums of the values, LANES * V of their dimensions.
template <typename T, int H, int V>
inline void weigh(const float* weights, int64_t width, const T* values, const T* next, int64_t number, int64_t dim, const float* scales, T* out) {
    vec sums[H][V] = {};
    for (int64_t key = 0; key < number; ++key) {
        for (int v = 0; v < V * LANES; v += 64 / sizeof(T)) __builtin_prefetch(next + key * dim + v, 0, 2);
        vec value[V];
        for (int v = 0; v < V; ++v) value[v] = load(values + key * dim + v * LANES);
        for (int head = 0; head < H; ++head)
            for (int v = 0; v < V; ++v) sums[head][v] += value[v] * weights[head * width + key];
    }
    for (int head = 0; head < H; ++head)
        for (int v = 0; v < V; ++v)
            store(sums[head][v] * scales[head], out + head * dim + v * LANES);
}

template <typename T, int V>
inline void weigh_heads(int64_t heads, const float* weights, int64_t width, const T* values, const T* next, int64_t number, int64_t dim, const float* scales, T* out) {
    int64_t head = 0;
    for (; head + 4 <= heads; head += 4) weigh<T, 4, V>(weights + head * width, width, values, next, number, dim, scales + head, out + head * dim);
    if (heads - head == 3) weigh<T, 3, V>(weights + head * width, width, values, next, number, dim, scales + head, out + head * dim);
    if (heads - head == 2) weigh<T, 2, V>(weights + head * width, width, values, next, number, dim, scales + head, out + head * dim);
    if (heads - head == 1) weigh<T, 1, V>(weights + head * width, width, values, next, number, dim, scales + head, out + head * dim);
}

// The query heads of one token that share a key-value head, over positions [first, last) of its slot. scores: room for heads * width floats,
// and for one more float a head.
template <typename T>
void attend(const T* query, int64_t heads, const T* keys, const T* values, const T* next_keys, const T* next_values, int64_t first, int64_t last, int64_t dim, float scale, float* scores, T* out) {
    const int64_t number = last - first, width = (number + KEYS - 1) / KEYS * KEYS;
    float* scales = scores + heads * width;
    score(query, heads, keys, next_keys, first, last, dim, scale, scores);
    for (int64_t head = 0; head < heads; ++head) {
        float* row = scores + head * width;
        vec highest = vec{} + row[0], sums = {};
        float most = row[0], sum = 0;
        each_of(number, [&](int64_t i) { highest = larger(highest, load(row + i)); }, [&](int64_t i) { most = std::max(most, row[i]); });
        most = std::max(most, folded(highest, larger));
        each_of(
            number,
            [&](int64_t i) {
                const vec one = exponential(load(row + i) - most);
                sums += one;
                store(one, row + i);
            },
            [&](int64_t i) { sum += row[i] = exponential(row[i] - most); });
        scales[head] = 1.0f / (sum + sum_of(sums));
    }
    const T *from = values + first * dim, *following = next_values + first * dim;
    int64_t at = 0;
    for (; at + 4 * LANES <= dim; at += 4 * LANES) weigh_heads<T, 4>(heads, scores, width, from + at, following + at, number, dim, scales, out + at);
    for (; at + LANES <= dim; at += LANES) weigh_heads<T, 1>(heads, scores, width, from + at, following + at, number, dim, scales, out + at);
    for (; at < dim; ++at)
        for (int64_t head = 0; head < heads; ++head) {
            float sum = 0;
            for (int64_t key = 0; key < number; ++key) sum += scores[head * width + key] * to_float(from[key * dim + at]);
            out[head * dim + at] = rounded<T>(sum * scales[head]);
        }
}

// What one thread needs to attend for a block of a prompt's tokens.
template <typename T> struct BlockScratch {
    static constexpr int64_t KEYS_AT_ONCE = 256;  // packed, they and their values fit the second cache, a tile's scores the first
    T *queries, *keys, *values, *weights;
    float *scores, *sums, *most, *total;

    static int64_t rounded_up(int64_t size) { return (size + 63) / 64 * 64; }
    static int64_t row() { return apart<T>(KEYS_AT_ONCE); }

    // Of all but the pointers; `start` null only measures.
    int64_t place(char* start, int64_t rows, int64_t dim) {
        int64_t at = 0;
        const auto take = [&](auto*& pointer, int64_t size) {
            pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(start + at);
            at += rounded_up(size * sizeof(*pointer));
        };
        take(queries, rows * apart<T>(dim));
        take(keys, KEYS_AT_ONCE * dim);
        take(values, KEYS_AT_ONCE * panels(dim) * PANEL);
        take(weights, MOST_ROWS * row());
        take(scores, MOST_ROWS * KEYS_AT_ONCE);
        take(sums, rows * panels(dim) * PANEL);
        take(most, rows);
        take(total, rows);
        return at;
    }
};

// Tokens of a block that reads keys and values together: as many as make so many rows of queries.
constexpr int64_t BLOCK_ROWS = 192;
inline int64_t block_tokens(int64_t heads) { return std::max<int64_t>(8, BLOCK_ROWS / heads); }

#ifdef __AVX512F__
// 16 words of each of 16 rows become rows of 16, `stride` words apart.
inline void transpose_words(const int32_t* const (&rows)[16], int64_t from, int32_t* to, int64_t stride) {
    __m512i x[16], y[16];
    for (int i = 0; i < 16; ++i) y[i] = _mm512_loadu_si512(rows[i] + from);
    for (int i = 0; i < 16; i += 2) {
        x[i] = _mm512_unpacklo_epi32(y[i], y[i + 1]);
        x[i + 1] = _mm512_unpackhi_epi32(y[i], y[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {  // of four rows: words j, j + 4 ... of each lane
            y[i + 2 * j] = _mm512_unpacklo_epi64(x[i + j], x[i + j + 2]);
            y[i + 2 * j + 1] = _mm512_unpackhi_epi64(x[i + j], x[i + j + 2]);
        }
    for (int j = 0; j < 4; ++j) {
        const auto store_pair = [&](__m512i a, __m512i b, int word) {
            _mm512_storeu_si512(to + word * stride, _mm512_shuffle_i32x4(a, b, 0x88));
            _mm512_storeu_si512(to + (word + 8) * stride, _mm512_shuffle_i32x4(a, b, 0xdd));
        };
        store_pair(_mm512_shuffle_i32x4(y[j], y[4 + j], 0x88), _mm512_shuffle_i32x4(y[8 + j], y[12 + j], 0x88), j);
        store_pair(_mm512_shuffle_i32x4(y[j], y[4 + j], 0xdd), _mm512_shuffle_i32x4(y[8 + j], y[12 + j], 0xdd), j + 4);
    }
}
#endif

// As a product's weights: the keys are outputs, panel by panel.
template <typename T> void pack_keys(const T* keys, int64_t number, int64_t dim, T* packed) {
    constexpr int64_t step = STEP<T, T>;
    for (int64_t first = 0; first < number; first += PANEL, packed += dim * PANEL) {
        const auto key = [&](int64_t i) { return keys + std::min(first + i, number - 1) * dim; };
#ifdef __AVX512F__
        if (dim % (16 * step) == 0) {
            for (int64_t half = 0; half < PANEL; half += 16) {
                const int32_t* rows[16];
                for (int64_t i = 0; i < 16; ++i) rows[i] = reinterpret_cast<const int32_t*>(key(half + i));
                for (int64_t k = 0; k < dim / step; k += 16) transpose_words(rows, k, reinterpret_cast<int32_t*>(packed) + k * PANEL + half, PANEL);
            }
            continue;
        }
#endif
        for (int64_t i = 0; i < PANEL; ++i)
            for (int64_t k = 0; k < dim; k += step) std::memcpy(packed + k * PANEL + i * step, key(i) + k, step * sizeof(T));
    }
}

// And the values are inputs, up to a whole panel's number of them.
template <typename T> void pack_values(const T* values, int64_t number, int64_t dim, T* packed) {
    constexpr int64_t step = STEP<T, T>;
    for (int64_t first = 0; first < dim; first += PANEL, packed += BlockScratch<T>::KEYS_AT_ONCE * PANEL)
        for (int64_t key = 0; key < panels(number) * PANEL; key += step) {
            const T *from = values + std::min(key, number - 1) * dim + first, *next = values + std::min(key + 1, number - 1) * dim + first;
            T* to = packed + key * PANEL;
            const auto one = [&](int64_t i) {
                to[i * step] = from[i];
                if (step == 2) to[i * step + 1] = next[i];
            };
            each_of(
                std::min<int64_t>(PANEL, dim - first),
                [&](int64_t i) {
                    if constexpr (step == 1)
                        store(load(from + i), to + i);
                    else
                        *reinterpret_cast<uvec_u*>(to + 2 * i) = ((uvec)load(from + i) >> 16) | (uvec)load(next + i);
                },
                one);
        }
}

// A row's weights of the keys [from, to) of `number`, whose scores lie in panels `rows` apart; those of the others are 0. Returns what
// the row's earlier sums shrink by.
template <typename T>
float weigh_row(const float* scores, int64_t rows, int64_t from, int64_t to, int64_t number, float scale, float& most, float& total, T* weights) {
    const int64_t first = from / LANES * LANES, last = std::min((std::max<int64_t>(to, 0) + LANES - 1) / LANES * LANES, panels(number) * PANEL);
    const auto score_of = [&](int64_t key) { return load(scores + key / PANEL * rows * PANEL + key % PANEL) * scale; };
    ivec place;
    for (int i = 0; i < LANES; ++i) place[i] = i;
    const auto is_seen = [&](int64_t key) { return (place >= int32_t(from - key)) & (place < int32_t(to - key)); };
    const auto all_seen = [&](int64_t key) { return key >= from && key + LANES <= to; };
    vec highest = vec{} + most;
    for (int64_t key = first; key < last; key += LANES) {
        const vec found = score_of(key);
        if (all_seen(key))
            highest = larger(found, highest);
        else
            highest = is_seen(key) ? larger(found, highest) : highest;
    }
    const float before = most;
    most = folded(highest, larger);
    vec sums = {};
    for (int64_t key = first; key < last; key += LANES) {
        vec one = exponential(score_of(key) - most);
        if (!all_seen(key)) one = is_seen(key) ? one : vec{};
        sums += one;
        store(one, weights + key);
    }
    const int64_t start = std::min(first, last);
    std::fill(weights, weights + start, T{});
    std::fill(weights + last, weights + panels(number) * PANEL, T{});
    const float factor = exponential(before - most);
    total = total * factor + sum_of(sums);
    return factor;
}

// The query heads of a prompt's tokens that share a key-value head: token i stands at `position` + i, and sees its slot up to there. Keys
// and values are read once for all of them and multiplied as a product's weights are; the softmax goes on from keys to keys.
// https://arxiv.org/abs/2205.14135
template <typename T>
void attend_block(const T* query, int64_t query_stride, int64_t tokens, int64_t heads, int64_t position, const T* keys, const T* values, int64_t window,
                  int64_t dim, float scale, const BlockScratch<T>& held, T* out, int64_t out_stride) {
    constexpr int64_t AT_ONCE = BlockScratch<T>::KEYS_AT_ONCE;
    const int64_t rows = tokens * heads, stride = apart<T>(dim), wide = panels(dim) * PANEL, last = position + tokens;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t head = 0; head < heads; ++head)
            std::memcpy(held.queries + (t * heads + head) * stride, query + t * query_stride + head * dim, dim * sizeof(T));
    std::fill(held.sums, held.sums + rows * wide, 0.0f);
    std::fill(held.most, held.most + rows, -1e30f);
    std::fill(held.total, held.total + rows, 0.0f);
    alignas(64) float found[MOST_ROWS * PANEL];
    for (int64_t first = window ? std::max<int64_t>(0, position + 1 - window) : 0; first < last; first += AT_ONCE) {
        const int64_t number = std::min(AT_ONCE, last - first);
        pack_keys(keys + first * dim, number, dim, held.keys);
        pack_values(values + first * dim, number, dim, held.values);
        each_block<T>(rows, [&](int64_t row, int64_t some, int64_t, int64_t) {
            const int64_t seen = std::min(number, position + (row + some - 1) / heads + 1 - first);
            if (seen <= 0) return;
            for (int64_t panel = 0; panel < panels(seen); ++panel)
                Panel<T>(Weight{held.keys}, panel, dim, rows).multiply(some, held.queries + row * stride, stride, held.scores + panel * some * PANEL);
            float factors[MOST_ROWS];
            for (int64_t r = 0; r < some; ++r) {
                const int64_t at = position + (row + r) / heads + 1 - first;  // the first key that is hidden
                factors[r] = weigh_row(held.scores + r * PANEL, some, window ? std::max<int64_t>(0, at - window) : 0, std::min(at, number), seen, scale,
                                       held.most[row + r], held.total[row + r], held.weights + r * BlockScratch<T>::row());
            }
            for (int64_t panel = 0; panel < panels(dim); ++panel) {
                const Panel<T> values_of(Weight{held.values + panel * AT_ONCE * PANEL}, 0, panels(seen) * PANEL, rows);
                values_of.multiply(some, held.weights, BlockScratch<T>::row(), found);
                for (int64_t r = 0; r < some; ++r) {
                    float* to = held.sums + (row + r) * wide + panel * PANEL;
                    for (int64_t i = 0; i < PANEL; i += LANES) store(load(to + i) * factors[r] + load(found + r * PANEL + i), to + i);
                }
            }
        });
    }
    for (int64_t row = 0; row < rows; ++row) {
        const float one = 1.0f / held.total[row];
        const float* sums = held.sums + row * wide;
        T* to = out + row / heads * out_stride + row % heads * dim;
        each_of(dim, [&](int64_t i) { store(load(sums + i) * one, to + i); }, [&](int64_t i) { to[i] = rounded<T>(sums[i] * one); });
    }
}

// ---------------------------------------------------------------------------------------------------------------- the step

struct Layer {
    Linear qkv, out, gate_up, down;
    const void *norm_in, *norm_mlp, *norm_qk;  // norm_qk: [heads + kv heads, dim], null where the model has none
    void *keys, *values;                       // [slot, kv head, position, dim]
    int64_t window;                            // 0: none
};

struct Model {
    int64_t is_bf16, num_layers, hidden, intermediate, heads, kv_heads, dim, max_len, largest_rank;
    double eps, scale;
    const void *embedding, *cos, *sin, *norm;
    Linear head;
    const Layer* layers;
};

struct Batch {
    int64_t tokens, num_wanted;
    const int64_t *ids, *positions, *slots, *wanted, *owners;  // owners: each token's adapter, or -1; null if none has one
    float* logits;                                             // [num_wanted, head.outs]
};

// Tokens [start, stop) of a step that follow each other in one sequence.
struct Run {
    int64_t start, stop;
};

struct Runs {
    std::vector<Run> blocks;       // of a prompt, so many that they read its keys together
    std::vector<int64_t> singles;  // tokens that read theirs alone
};

constexpr int64_t FEW = 8;  // tokens that follow each other are as fast one by one

inline Runs runs_of(const Batch& b, int64_t block) {
    Runs found;
    for (int64_t start = 0, stop; start < b.tokens; start = stop) {
        for (stop = start + 1; stop < b.tokens && b.slots[stop] == b.slots[start] && b.positions[stop] == b.positions[stop - 1] + 1; ++stop) continue;
        if (stop - start < FEW)
            for (int64_t t = start; t < stop; ++t) found.singles.push_back(t);
        else
            for (int64_t t = start; t < stop; t += block) found.blocks.push_back({t, std::min(t + block, stop)});
    }
    return found;
}

template <typename T> void run_step(const Model& m, const Batch& b) {
    if (!b.tokens) return;
    static thread_local std::vector<char> held[7];
    const int64_t tokens = b.tokens, dim = m.dim, qk_heads = m.heads + m.kv_heads, qkv_size = (qk_heads + m.kv_heads) * dim;
    const int64_t group = m.heads / m.kv_heads, widest = std::max({m.hidden, m.heads * dim, m.intermediate});
    T* hidden = room<T>(held[0], tokens * m.hidden);
    T* x = room<T>(held[1], tokens * apart<T>(widest));
    T* wide = room<T>(held[2], tokens * std::max({qkv_size, 2 * m.intermediate, apart<T>(m.intermediate)}));
    T* scratch = room<T>(held[3], tokens * apart<T>(m.largest_rank));
    T* last_hidden = room<T>(held[4], b.num_wanted * m.hidden);
    const int64_t stride = apart<T>(m.hidden), attention_stride = apart<T>(m.heads * dim);
    const float eps = float(m.eps), scale = float(m.scale);
    const int64_t longest = (*std::max_element(b.positions, b.positions + tokens) / KEYS + 1) * KEYS;
    const int64_t own_scores = (group * longest + group + 15) / 16 * 16;
    float* all_scores = room<float>(held[5], own_scores * omp_get_max_threads());
    const int64_t block = block_tokens(group);
    const Runs runs = runs_of(b, block);
    const int64_t block_size = runs.blocks.empty() ? 0 : BlockScratch<T>().place(nullptr, block * group, dim);
    char* block_rooms = room<char>(held[6], block_size * omp_get_max_threads());
    // Behind the last layer's keys and values only the wanted tokens go on.
    const bool drops = b.num_wanted < tokens;
    uint64_t present = 0;
    std::vector<int64_t> owners_behind;  // of the rows behind the last layer's keys and values
    if (b.owners) {
        for (int64_t t = 0; t < tokens; ++t) present |= b.owners[t] < 0 ? 0 : uint64_t(1) << b.owners[t] % 64;
        for (int64_t w = 0; w < b.num_wanted; ++w) owners_behind.push_back(b.owners[b.wanted[w]]);
    }
    const Adapted<T> of_all(b.owners, present, scratch), of_wanted(b.owners ? owners_behind.data() : nullptr, present, scratch);

    in_parallel(m.num_layers * 14 + 4, [&](Team& team) {
        float* scores = all_scores + own_scores * team.thread;
        BlockScratch<T> block_room;
        block_room.place(block_rooms + block_size * team.thread, block * group, dim);
        team.share(tokens, [&](int64_t t) {
            std::memcpy(hidden + t * m.hidden, static_cast<const T*>(m.embedding) + b.ids[t] * m.hidden, m.hidden * sizeof(T));
        });
        int64_t rows = tokens;
        T* rest = hidden;
        for (int64_t i = 0; i < m.num_layers; ++i) {
            const Layer& layer = m.layers[i];
            const bool drops_here = drops && i + 1 == m.num_layers;
            const Adapted<T>& adapted = drops_here ? of_wanted : of_all;
            T *keys = static_cast<T*>(layer.keys), *values = static_cast<T*>(layer.values);
            team.share(tokens, [&](int64_t t) {
                norm(hidden + t * m.hidden, static_cast<const T*>(layer.norm_in), m.hidden, eps, x + t * stride);
            });
            multiply(team, layer.qkv, x, tokens, wide, false, of_all);
            team.share(tokens * (qk_heads + m.kv_heads), [&](int64_t unit) {
                const int64_t t = unit / (qk_heads + m.kv_heads), head = unit % (qk_heads + m.kv_heads), position = b.positions[t];
                T* at = wide + t * qkv_size + head * dim;
                const int64_t kv = head < m.heads ? 0 : head < qk_heads ? head - m.heads : head - qk_heads;
                const int64_t cell = ((b.slots[t] * m.kv_heads + kv) * m.max_len + position) * dim;
                if (head >= qk_heads) {
                    std::memcpy(values + cell, at, dim * sizeof(T));
                    return;
                }
                if (layer.norm_qk) norm(at, static_cast<const T*>(layer.norm_qk) + head * dim, dim, eps, at);
                rotate(at, static_cast<const T*>(m.cos) + position * dim, static_cast<const T*>(m.sin) + position * dim, dim,
                       head < m.heads ? at : keys + cell);
            });
            const auto slot_of = [&](int64_t t, int64_t kv) { return (b.slots[t] * m.kv_heads + kv) * m.max_len * dim; };
            if (drops_here) {
                rows = b.num_wanted;
                rest = last_hidden;
                team.hand_out(rows, [&](int64_t w) { std::memcpy(rest + w * m.hidden, hidden + b.wanted[w] * m.hidden, m.hidden * sizeof(T)); });
            } else
                team.hand_out(runs.blocks.size() * m.kv_heads, [&](int64_t unit) {
                    const Run& run = runs.blocks[runs.blocks.size() - 1 - unit / m.kv_heads];  // who reads most goes first
                    const int64_t kv = unit % m.kv_heads, slot = slot_of(run.start, kv), head = kv * group * dim;
                    attend_block(wide + run.start * qkv_size + head, qkv_size, run.stop - run.start, group, b.positions[run.start], keys + slot, values + slot,
                                 layer.window, dim, scale, block_room, x + run.start * attention_stride + head, attention_stride);
                });
            const int64_t singles = drops_here ? rows : runs.singles.size();
            // A token's heads are shared among threads only where there are fewer tokens than that keeps busy.
            const int64_t together = singles * m.kv_heads >= team.threads ? group : 1;
            team.share(singles * m.heads / together, [&](int64_t unit, int64_t next) {
                const int64_t row = unit / (m.heads / together), head = unit % (m.heads / together) * together;
                const int64_t t = drops_here ? b.wanted[row] : runs.singles[row], last = b.positions[t] + 1;
                const int64_t first = layer.window ? std::max<int64_t>(0, last - layer.window) : 0, slot = slot_of(t, head / group);
                const int64_t next_row = next / (m.heads / together), next_head = next % (m.heads / together) * together;
                const int64_t next_slot = slot_of(drops_here ? b.wanted[next_row] : runs.singles[next_row], next_head / group);
                attend(wide + t * qkv_size + head * dim, together, keys + slot, values + slot, keys + next_slot, values + next_slot, first, last, dim, scale, scores,
                       x + (drops_here ? row : t) * attention_stride + head * dim);
            });
            multiply(team, layer.out, x, rows, rest, true, adapted);
            team.share(rows, [&](int64_t t) { norm(rest + t * m.hidden, static_cast<const T*>(layer.norm_mlp), m.hidden, eps, x + t * stride); });
            multiply(team, layer.down, multiply_gated(team, layer.gate_up, x, rows, wide, adapted), rows, rest, true, adapted);
        }
        team.share(b.num_wanted, [&](int64_t w) {
            norm(rest + (drops ? w : b.wanted[w]) * m.hidden, static_cast<const T*>(m.norm), m.hidden, eps, x + w * stride);
        });
        team.share(b.num_wanted ? panels(m.head.outs) : 0, [&](int64_t panel, int64_t next) {
            multiply_panel(x, stride, b.num_wanted, m.head.weight, panel, next, m.head.outs, m.head.ins, [&](int64_t row, int64_t first, int64_t n, const float* sums) {
                float* to = b.logits + row * m.head.outs + first;
                const T* bias = bias_of<T>(m.head, first);
                each_of(
                    n, [&](int64_t i) { store(kept<T>(bias ? load(sums + i) + load(bias + i) : load(sums + i)), to + i); },
                    [&](int64_t i) { to[i] = to_float(rounded<T>(bias ? sums[i] + to_float(bias[i]) : sums[i])); });
            });
        });
    });
}

template <typename T> void run_linear(const Linear& linear, const void* x, int64_t rows, void* y) {
    static thread_local std::vector<char> held;
    const int64_t ins = linear.ins;
    T* copied = room<T>(held, rows * apart<T>(ins));
    in_parallel(2, [&](Team& team) {
        team.share(rows, [&](int64_t row) { std::memcpy(copied + row * apart<T>(ins), static_cast<const T*>(x) + row * ins, ins * sizeof(T)); });
        multiply(team, linear, copied, rows, static_cast<T*>(y), false, Adapted<T>());
    });
}

template <typename T> void run_pack(const T* weight, int64_t outs, int64_t ins, T* packed) {
    constexpr int64_t STEP = std::is_same<T, float>::value ? 1 : 2;
#pragma omp parallel for
    for (int64_t panel = 0; panel < panels(outs); ++panel) {
        T* to = packed + panel * ins * PANEL;
        for (int64_t k = 0; k < ins; k += STEP)
            for (int64_t out = panel * PANEL; out < (panel + 1) * PANEL; ++out)
                for (int64_t i = k; i < k + STEP; ++i) *to++ = out < outs ? weight[out * ins + i] : T{};
    }
}

// int8 [outs][ins] -> bytes: [panels][ins][32]; to be expanded, sign and magnitude, [panels][ins / 2][64] in the order in which the pairs
// of 32 outputs come out of unpacking the bytes' low and high halves.
void run_pack_int8(bool expands, const int8_t* weight, int64_t outs, int64_t ins, int8_t* packed) {
    const auto at = [&](int64_t out, int64_t in) { return out < outs ? weight[out * ins + in] : int8_t(0); };
#pragma omp parallel for
    for (int64_t panel = 0; panel < panels(outs); ++panel) {
        int8_t* to = packed + panel * ins * PANEL;
        if (!expands)
            for (int64_t k = 0; k < ins; ++k)
                for (int64_t out = panel * PANEL; out < (panel + 1) * PANEL; ++out) *to++ = at(out, k);
        else
            for (int64_t k = 0; k < ins; k += 2)
                for (int64_t i = 0; i < 64; ++i) {
                    const int64_t half = i % 16 / 8, word = i / 16 * 8 + i % 8;
                    const int value = at(panel * PANEL + half * 16 + word / 2, k + word % 2);
                    *to++ = int8_t(value < 0 ? -value | 0x80 : value);
                }
    }
}

// int8 [outs][ins], -8 ... 7 -> [panels][ins / 8] blocks of 128 bytes: two inputs in a byte, [4][32]; to be expanded, words of four pairs'
// nibbles, [32 outputs][2 of a pair].
void run_pack_int4(bool expands, const int8_t* weight, int64_t outs, int64_t ins, uint8_t* packed) {
    const auto at = [&](int64_t out, int64_t in) { return out < outs ? weight[out * ins + in] & 15 : 0; };
#pragma omp parallel for
    for (int64_t panel = 0; panel < panels(outs); ++panel) {
        uint8_t* to = packed + panel * ins * PANEL / 2;
        for (int64_t k = 0; k < ins; k += BLOCK)
            for (int64_t i = 0; i < BLOCK * PANEL / 2; ++i) {
                const int64_t word = i / 2, nibble = i % 2 * 2;  // of a word: its low byte has the first two pairs'
                const int64_t out = panel * PANEL + (expands ? word / 2 : i % PANEL), low = k + (expands ? 2 * nibble + word % 2 : i / PANEL * 2);
                *to++ = uint8_t(at(out, low) | at(out, low + (expands ? 2 : 1)) << 4);
            }
    }
}

}  // namespace

extern "C" {

const char* danlu_vectors() {
#ifdef __AVX512BF16__
    return HAS_TILES ? "AVX512-BF16 and AMX" : "AVX512-BF16";
#elif defined(__AVX512F__)
    return "AVX512";
#elif defined(__AVX__)
    return "AVX2";
#else
    return "no AVX";
#endif
}

// packed: [panels * 32 * ins]; bf16 takes an even number of inputs.
void danlu_pack(int is_bf16, const void* weight, int64_t outs, int64_t ins, void* packed) {
    if (is_bf16)
        run_pack(static_cast<const bf16*>(weight), outs, ins, static_cast<bf16*>(packed));
    else
        run_pack(static_cast<const float*>(weight), outs, ins, static_cast<float*>(packed));
}

// values: int8; packed: [panels * 32 * ins * bits / 8] bytes. bf16 takes an even number of inputs; 4 bits take a multiple of 8.
void danlu_pack_integers(int is_bf16, int bits, const int8_t* values, int64_t outs, int64_t ins, void* packed) {
    const bool expands = is_bf16 && Expands<bf16>;
    if (bits == 8)
        run_pack_int8(expands, values, outs, ins, static_cast<int8_t*>(packed));
    else
        run_pack_int4(expands, values, outs, ins, static_cast<uint8_t*>(packed));
}

// Without its LoRA.
void danlu_linear(int is_bf16, const Linear* linear, const void* x, int64_t rows, void* y) {
    if (is_bf16)
        run_linear<bf16>(*linear, x, rows, y);
    else
        run_linear<float>(*linear, x, rows, y);
}

void danlu_step(const Model* model, const Batch* batch) {
    if (model->is_bf16)
        run_step<bf16>(*model, *batch);
    else
        run_step<float>(*model, *batch);
}
}
