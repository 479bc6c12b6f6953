// LayerNorm and attention in registers. Part of tile.cpp: queries make panels, keys and values strips, so that both products
// of an attention are those of tile.cpp.
#pragma once

#include "half.h"

namespace blockprune {
namespace {

inline float sum_of(Vec v) {
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += v[i];
    return sum;
}

template <typename T>
void normalise_row(const Norm& norm, const T* x, T* y) {
    const T *weight = static_cast<const T*>(norm.weight), *bias = static_cast<const T*>(norm.bias);
    const int64_t whole = norm.width / LANES * LANES;
    Vec sums = {};
    for (int64_t k = 0; k < whole; k += LANES) sums += load(x + k);
    float sum = sum_of(sums);
    for (int64_t k = whole; k < norm.width; ++k) sum += to_float(x[k]);
    const float mean = sum / float(norm.width);
    Vec squares = {};
    for (int64_t k = 0; k < whole; k += LANES) {
        const Vec off = load(x + k) - mean;
        squares += off * off;
    }
    float square = sum_of(squares);
    for (int64_t k = whole; k < norm.width; ++k) square += (to_float(x[k]) - mean) * (to_float(x[k]) - mean);
    const float factor = 1.0f / __builtin_sqrtf(square / float(norm.width) + float(norm.epsilon));
    for (int64_t k = 0; k < whole; k += LANES) {
        store(y + k, (load(x + k) - mean) * factor * load(weight + k) + load(bias + k));
    }
    if (whole == norm.width) return;
    T last[4][LANES] = {};
    const int64_t rest = norm.width - whole;
    const T* from[] = {x, weight, bias};
    for (int i = 0; i < 3; ++i) std::memcpy(last[i], from[i] + whole, rest * sizeof(T));
    store(last[3], (load(last[0]) - mean) * factor * load(last[1]) + load(last[2]));
    std::memcpy(y + whole, last[3], rest * sizeof(T));
}

void normalise_rows(const Norm& norm, int32_t dtype, const void* x, int64_t rows, void* y) {
    for (int64_t r = 0; r < rows; ++r) {
        if (dtype == BFLOAT16) {
            normalise_row(norm, static_cast<const uint16_t*>(x) + r * norm.width, static_cast<uint16_t*>(y) + r * norm.width);
        } else {
            normalise_row(norm, static_cast<const float*>(x) + r * norm.width, static_cast<float*>(y) + r * norm.width);
        }
    }
}

inline int64_t up_to(int64_t value, int64_t multiple) { return divide_up(value, multiple) * multiple; }

constexpr int32_t KEYS = WIDEST_STRIP;  // of a strip
constexpr float LOG2_E = 1.44269504f;

// How a head's numbers lie in memory.
struct Sizes {
    int64_t features, keys;  // filled up with zeros
    int32_t outputs;         // of a strip of values
    int64_t words_of_features, words_of_keys;

    template <class Words>
    static Sizes of(const Attention& a) {
        constexpr int64_t side = Words::PER_WORD > 1 ? GROUP * Words::PER_WORD : 1;
        const int64_t features = up_to(a.head_size, side), keys = up_to(a.tokens, KEYS);
        const int32_t outputs = a.head_size % WIDEST_STRIP ? 16 : WIDEST_STRIP;
        return {features, keys, outputs, features / Words::PER_WORD, keys / Words::PER_WORD};
    }

    int64_t key_floats() const { return keys * words_of_features; }
    int64_t value_floats(int64_t head_size) const { return words_of_keys * up_to(head_size, outputs); }
    int64_t panel_floats() const { return (words_of_features > words_of_keys ? words_of_features : words_of_keys) * STRIDE; }
};

// A row of numbers as the words of a kind hold them.
inline void convert(const float* from, int64_t count, float* to) { std::memcpy(to, from, count * sizeof(float)); }
inline void convert(const uint16_t* from, int64_t count, uint16_t* to) { std::memcpy(to, from, count * sizeof(uint16_t)); }

inline void convert(const float* from, int64_t count, uint16_t* to) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    for (; i < count; ++i) {
        float last[LANES] = {from[i]};
        uint16_t rounded[LANES];
        store(rounded, load(last));
        to[i] = rounded[0];
    }
}

inline void convert(const uint16_t* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

// Rows of one head as [rows, features], zeros behind.
template <class Words, typename T>
void take_rows(const T* from, int64_t stride, int64_t rows, int64_t head_size, int64_t features, typename Words::Stored* to) {
    for (int64_t r = 0; r < rows; ++r, to += features) {
        convert(from + r * stride, head_size, to);
        for (int64_t k = head_size; k < features; ++k) to[k] = 0;
    }
}

// Strips of keys: for each word of features, those of KEYS keys side by side.
template <class Words>
void pack_keys(const typename Words::Stored* rows, const Attention& a, const Sizes& sizes, float* to) {
    for (int64_t key = 0; key < a.tokens; key += KEYS, to += KEYS * sizes.words_of_features) {
        const int64_t count = a.tokens - key < KEYS ? a.tokens - key : KEYS;
        if (count < KEYS) std::memset(to, 0, KEYS * sizes.words_of_features * sizeof(float));
        Words::pack(rows + key * sizes.features, count, sizes.features, to, KEYS);
    }
}

// Strips of values: for each word of keys, the features of a strip side by side.
template <class Words>
void pack_values(const typename Words::Stored* rows, const Attention& a, const Sizes& sizes, float* to) {
    using Stored = typename Words::Stored;
    constexpr int per = Words::PER_WORD;
    for (int64_t first = 0; first < a.head_size; first += sizes.outputs) {
        const int64_t count = a.head_size - first < sizes.outputs ? a.head_size - first : sizes.outputs;
        for (int64_t key = 0; key < sizes.keys; key += per, to += sizes.outputs) {
            Stored* words = reinterpret_cast<Stored*>(to);
            if (count < sizes.outputs || key + per > a.tokens) std::memset(to, 0, sizes.outputs * sizeof(float));
            for (int j = 0; j < per && key + j < a.tokens; ++j) {
                const Stored* row = rows + (key + j) * sizes.features + first;
                for (int64_t i = 0; i < count; ++i) words[i * per + j] = row[i];
            }
        }
    }
}

// x as panels take it: rows of `features` numbers, all in one block column.
template <class Words>
Input rows_as_input(const typename Words::Stored* rows, int64_t count, int64_t features) {
    Input input{rows, features, count, features, features, 1, Words::PER_WORD > 1 ? BFLOAT16 : FLOAT32, FLOAT32};
    input.column_words = features / Words::PER_WORD;
    return input;
}

template <class Words>
void pack_rows_as_panel(const Input& input, int32_t tokens, float* panel) {
#ifdef __AVX512BF16__
    if constexpr (Words::PER_WORD > 1) return pack_input_pairs<STRIDE>(input, 0, tokens, panel);
    else
#endif
        return pack_panel<float>(input, 0, tokens, panel);
}

// The sums of a panel with a strip that keeps all of its one block column.
template <class Words>
void sum_up_strip(const Input& input, float* weights, int32_t width, int32_t tokens, const float* panel, float* sums) {
    static const int32_t first = 0;
    const Strip strip{nullptr, 0, width, width, &first, 1, nullptr, weights};
    sum_up<Words, Words::PER_WORD == 1 ? 1 : GROUP>(input, strip, tokens, panel, sums);
}

// The base of softmax's powers: 2 takes less time than e, and does where they are rounded to bfloat16 next.
template <class Words>
constexpr bool IN_POWERS_OF_TWO = Words::PER_WORD > 1;

// What is added to the logits of an image, times the logarithm of e in the base: nothing can be seen behind the tokens.
template <class Words>
void take_bias(const Attention& a, int64_t image, int64_t keys, float* to) {
    const float factor = IN_POWERS_OF_TWO<Words> ? LOG2_E : 1.0f;
    for (int64_t k = 0; k < a.tokens; ++k) to[k] = a.bias ? a.bias[image * a.tokens + k] * factor : 0.0f;
    for (int64_t k = a.tokens; k < keys; ++k) to[k] = -__builtin_inff();
}

// Turns logits of a query into numbers that are proportional to its weights; what they add up to.
template <class Words>
float softmax(float* logits, const float* bias, float scale, int64_t keys, typename Words::Stored* weights) {
    if (IN_POWERS_OF_TWO<Words>) scale *= LOG2_E;
    Vec most = Vec{} - __builtin_inff();
    for (int64_t k = 0; k < keys; k += LANES) {
        const Vec logit = load(logits + k) * scale + load(bias + k);
        store(logits + k, logit);
        most = logit > most ? logit : most;
    }
    float largest = most[0];
    for (int i = 1; i < LANES; ++i) largest = most[i] > largest ? most[i] : largest;
    Vec sums = {};
    for (int64_t k = 0; k < keys; k += LANES) {
        const Vec off = load(logits + k) - largest;
        const Vec weight = IN_POWERS_OF_TWO<Words> ? rough_power_of_two(off) : exponential(off);
        store(weights + k, weight);
        sums += weight;
    }
    return sum_of(sums);
}

template <typename T>
void keep_outputs(const float* sums, int32_t width, int64_t valid, float factor, T* y) {
    T last[WIDEST_STRIP];
    T* to = valid >= width ? y : last;
    for (int32_t v = 0; v < width; v += LANES) store(to + v, load(sums + v) * factor);
    if (to == last) std::memcpy(y, last, valid * sizeof(T));
}

// T is the dtype of q, k and v, Y that of y.
template <class Words, typename T, typename Y = T>
void attend_head(const Attention& a, int64_t image, int64_t head, int64_t begin, int64_t end, float* memory) {
    using Stored = typename Words::Stored;
    const Sizes sizes = Sizes::of<Words>(a);
    const int64_t place = image * a.tokens * a.stride + head * a.head_size;
    float *keys = memory, *values = keys + sizes.key_floats(), *panel = values + sizes.value_floats(a.head_size);
    float *logits = panel + sizes.panel_floats(), *bias = logits + MAX_TOKENS * sizes.keys;
    Stored* rows = reinterpret_cast<Stored*>(bias + sizes.keys);
    alignas(64) float sums[MAX_TOKENS * WIDEST_STRIP], totals[MAX_TOKENS];
    take_rows<Words>(static_cast<const T*>(a.k) + place, a.stride, a.tokens, a.head_size, sizes.features, rows);
    pack_keys<Words>(rows, a, sizes, keys);
    take_rows<Words>(static_cast<const T*>(a.v) + place, a.stride, a.tokens, a.head_size, sizes.features, rows);
    pack_values<Words>(rows, a, sizes, values);
    take_bias<Words>(a, image, sizes.keys, bias);
    const int64_t panels = divide_up(end - begin, MAX_TOKENS);
    for (int64_t p = 0; p < panels; ++p) {
        const int64_t query = begin + (end - begin) * p / panels;
        const int32_t count = int32_t(begin + (end - begin) * (p + 1) / panels - query);
        const T* q = static_cast<const T*>(a.q) + place + query * a.stride;
        take_rows<Words>(q, a.stride, count, a.head_size, sizes.features, rows);
        const Input of_queries = rows_as_input<Words>(rows, count, sizes.features);
        pack_rows_as_panel<Words>(of_queries, count, panel);
        for (int64_t key = 0; key < sizes.keys; key += KEYS) {
            sum_up_strip<Words>(of_queries, keys + key * sizes.words_of_features, KEYS, count, panel, sums);
            for (int32_t t = 0; t < count; ++t) {
                std::memcpy(logits + t * sizes.keys + key, sums + t * KEYS, KEYS * sizeof(float));
            }
        }
        for (int32_t t = 0; t < count; ++t) {
            totals[t] = softmax<Words>(logits + t * sizes.keys, bias, a.scale, sizes.keys, rows + t * sizes.keys);
        }
        const Input of_weights = rows_as_input<Words>(rows, count, sizes.keys);
        pack_rows_as_panel<Words>(of_weights, count, panel);
        Y* y = static_cast<Y*>(a.y) + place + query * a.stride;
        for (int64_t first = 0; first < a.head_size; first += sizes.outputs) {
            sum_up_strip<Words>(of_weights, values + first * sizes.words_of_keys, sizes.outputs, count, panel, sums);
            for (int32_t t = 0; t < count; ++t) {
                keep_outputs(sums + t * sizes.outputs, sizes.outputs, a.head_size - first, 1.0f / totals[t],
                             y + t * a.stride + first);
            }
        }
    }
}

template <class Words>
int64_t floats_of(const Attention& a) {
    const Sizes sizes = Sizes::of<Words>(a);
    const int64_t wider = sizes.features > sizes.keys ? sizes.features : sizes.keys;
    const int64_t rows = a.tokens * sizes.features > MAX_TOKENS * wider ? a.tokens * sizes.features : MAX_TOKENS * wider;
    return sizes.key_floats() + sizes.value_floats(a.head_size) + sizes.panel_floats() + (MAX_TOKENS + 1) * sizes.keys + rows;
}

#ifdef __AVX512BF16__
bool in_pairs(const Attention& a) { return a.halves || a.dtype == BFLOAT16; }
constexpr bool MULTIPLIES_PAIRS = true;
using OfHalves = Pairs;
#else
bool in_pairs(const Attention&) { return false; }
constexpr bool MULTIPLIES_PAIRS = false;
using OfHalves = Singles<float>;
#endif

int64_t attention_floats(const Attention& a) {
    return in_pairs(a) ? floats_of<OfHalves>(a) : floats_of<Singles<float>>(a);
}

void attend(const Attention& a, int64_t image, int64_t head, int64_t begin, int64_t end, float* memory) {
    if (a.dtype == FLOAT32 && !a.halves) return attend_head<Singles<float>, float>(a, image, head, begin, end, memory);
    const auto to_halves = in_pairs(a) ? attend_head<OfHalves, uint16_t> : attend_head<Singles<float>, uint16_t>;
    const auto to_floats = in_pairs(a) ? attend_head<OfHalves, uint16_t, float> : attend_head<Singles<float>, uint16_t, float>;
    (a.dtype == BFLOAT16 ? to_halves : to_floats)(a, image, head, begin, end, memory);
}

}  // namespace
}  // namespace blockprune
