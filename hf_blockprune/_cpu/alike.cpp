// What merging computes of the tokens' features: how alike they are, and means. Compiled once for each instruction set,
// as tile.cpp is.

#include <cstring>

#include "merge.h"
#include "vectors.h"

namespace blockprune {
namespace {

#if defined(__AVX512F__)
constexpr int CANDIDATES = 8;
#else
constexpr int CANDIDATES = 6;
#endif
constexpr int VECS = 2, PANEL = VECS * LANES;
constexpr float EPSILON = 1e-12f;  // least length of a direction

// Not the library's: of its templates one instruction set's copy would serve the others.
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
const T* features_of(const Merge& m, int64_t image, int64_t token) {
    return static_cast<const T*>(m.alike) + (image * m.tokens + token) * m.features;
}

template <typename T>
float inverse_length(const T* x, int64_t features) {
    Vec sums = {};
    int64_t k = 0;
    for (; k + LANES <= features; k += LANES) sums += load(x + k) * load(x + k);
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];
    for (; k < features; ++k) sum += to_float(x[k]) * to_float(x[k]);
    const float length = __builtin_sqrtf(sum);
    return 1.0f / (length > EPSILON ? length : EPSILON);
}

// Where targets end before the panel does, the last one stands in for more.
template <typename T>
void pack(const Merge& m, int64_t image, int64_t panel, float* to) {
    const int64_t whole = m.features / 4 * 4;
    const T* rows[PANEL];
    for (int64_t i = 0; i < PANEL; ++i) {
        rows[i] = features_of<T>(m, image, m.target(least(panel * PANEL + i, m.targets() - 1)));
        to[m.features * PANEL + i] = inverse_length(rows[i], m.features);
    }
    for (int64_t k = 0; k < whole; k += 4) {
        for (int64_t i = 0; i < PANEL; i += 4) {
            const T* const four[] = {rows[i], rows[i + 1], rows[i + 2], rows[i + 3]};
            transpose_four(four, k, to + k * PANEL + i, PANEL);
        }
    }
    for (int64_t k = whole; k < m.features; ++k) {
        for (int64_t i = 0; i < PANEL; ++i) to[k * PANEL + i] = to_float(rows[i][k]);
    }
}

inline IntVec lanes_from(int32_t first) {
    IntVec numbers;
    for (int lane = 0; lane < LANES; ++lane) numbers[lane] = first + lane;
    return numbers;
}

// The products of some candidates with a panel's targets; all sums stay in registers.
template <typename T>
inline void multiply(const T* const (&rows)[CANDIDATES], const float* panel, int64_t features,
                     Vec (&sums)[CANDIDATES][VECS]) {
    Vec total[CANDIDATES][VECS] = {};
    for (int64_t k = 0; k < features; ++k, panel += PANEL) {
        const Vec a = load(panel), b = load(panel + LANES);
#pragma GCC unroll 8
        for (int c = 0; c < CANDIDATES; ++c) {
            const float x = to_float(rows[c][k]);
            total[c][0] += a * x;
            total[c][1] += b * x;
        }
    }
    for (int c = 0; c < CANDIDATES; ++c) {
        for (int v = 0; v < VECS; ++v) sums[c][v] = total[c][v] * load(panel + v * LANES);
    }
}

template <typename T>
void nearest(const Merge& m, int64_t image, int64_t first, const float* panels, float* best, int32_t* target) {
    constexpr float NOTHING = -__builtin_inff();
    const int32_t targets = int32_t(m.targets());
    const T* rows[CANDIDATES];
    for (int64_t c = 0; c < CANDIDATES; ++c) {
        rows[c] = features_of<T>(m, image, m.candidate(least(first + c, m.candidates() - 1)));
    }
    Vec most[CANDIDATES];
    IntVec where[CANDIDATES];
    for (int c = 0; c < CANDIDATES; ++c) most[c] = Vec{} + NOTHING, where[c] = IntVec{};
    for (int32_t begin = 0; begin < targets; begin += PANEL, panels += (m.features + 1) * PANEL) {
        Vec sums[CANDIDATES][VECS];
        multiply(rows, panels, m.features, sums);
        for (int v = 0; v < VECS; ++v) {
            const IntVec numbers = lanes_from(begin + v * LANES), inside = numbers < targets;
            for (int c = 0; c < CANDIDATES; ++c) {
                const IntVec better = (sums[c][v] > most[c]) & inside;  // never of NaN
                most[c] = better ? sums[c][v] : most[c];
                where[c] = better ? numbers : where[c];
            }
        }
    }
    for (int64_t c = 0; c < least(CANDIDATES, m.candidates() - first); ++c) {
        int at = 0;
        for (int lane = 1; lane < LANES; ++lane) {
            const bool same = most[c][lane] == most[c][at] && where[c][lane] < where[c][at];
            if (most[c][lane] > most[c][at] || same) at = lane;
        }
        best[c] = most[c][at] * inverse_length(rows[c], m.features);
        target[c] = where[c][at];
    }
}

template <typename T>
void add(const Merge& m, int64_t image, const Part* parts, int64_t count, int64_t row) {
    const T* from = static_cast<const T*>(m.states) + image * m.tokens * m.width;
    T* to = static_cast<T*>(m.out_states) + (image * m.kept() + row) * m.width;
    if (count == 1) {
        std::memcpy(to, from + parts[0].token * m.width, m.width * sizeof(T));
        return;
    }
    int64_t k = 0;
    for (; k + LANES <= m.width; k += LANES) {
        Vec total = {};
        for (int64_t i = 0; i < count; ++i) total += load(from + parts[i].token * m.width + k) * parts[i].share;
        store(to + k, total);
    }
    for (; k < m.width; ++k) {
        float total = 0;
        for (int64_t i = 0; i < count; ++i) total += to_float(from[parts[i].token * m.width + k]) * parts[i].share;
        T last[LANES];
        store(last, Vec{} + total);
        to[k] = last[0];
    }
}

void pack_targets(const Merge& m, int64_t image, int64_t panel, float* to) {
    (m.dtype == BFLOAT16 ? pack<uint16_t> : pack<float>)(m, image, panel, to);
}

void find_nearest(const Merge& m, int64_t image, int64_t first, const float* panels, float* best, int32_t* target) {
    (m.dtype == BFLOAT16 ? nearest<uint16_t> : nearest<float>)(m, image, first, panels, best, target);
}

void add_parts(const Merge& m, int64_t image, const Part* parts, int64_t count, int64_t row) {
    (m.dtype == BFLOAT16 ? add<uint16_t> : add<float>)(m, image, parts, count, row);
}

}  // namespace

#define OBJECT(name) merging_##name
#define OBJECT_OF(name) OBJECT(name)

extern const MergeKernels OBJECT_OF(BLOCKPRUNE_ISA);
const MergeKernels OBJECT_OF(BLOCKPRUNE_ISA) = {PANEL, CANDIDATES, pack_targets, find_nearest, add_parts};

}  // namespace blockprune
