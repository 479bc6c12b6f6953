// Random products and merges of odd shapes through the C ABI, compared with plain loops in double precision. Built with sanitizers,
// and with every array exactly as large as the kernels may touch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "half.h"
#include "kernels.h"
#include "merge.h"

extern "C" {
const char* blockprune_cpu_isa(const char*);
int32_t blockprune_cpu_unpack(int64_t, int64_t, const void*, int32_t);
int32_t blockprune_cpu_merge(const char*, const void*, int32_t);
int32_t blockprune_cpu_half(const char*, const void*, int32_t);
int32_t blockprune_cpu_linear(
    const char*, const void*, int64_t, int64_t, int64_t, int32_t, int32_t, const void*, int64_t, int32_t);
}

namespace {

std::mt19937 generator(0);

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

template <typename T>
std::unique_ptr<T[]> exactly(const std::vector<T>& values) {  // a vector may own more than it shows
    auto copy = std::make_unique<T[]>(values.size());
    for (size_t i = 0; i < values.size(); ++i) copy[i] = values[i];
    return copy;
}

std::unique_ptr<float[]> noise(int64_t count) {
    auto values = std::make_unique<float[]>(count);
    for (int64_t i = 0; i < count; ++i) values[i] = std::normal_distribution<float>()(generator);
    return values;
}

struct Input {
    int64_t tokens = between(0, 70), features = between(1, 200), stride = features + between(0, 3);
    std::unique_ptr<float[]> x = noise(tokens ? (tokens - 1) * stride + features : 0);
};

struct Case {
    int64_t rows = between(0, 1) ? 16 * between(1, 5) : between(1, 70), nnz, cols, out;
    std::unique_ptr<int32_t[]> crow, col;
    std::unique_ptr<float[]> weight, bias, y, scale;
    std::unique_ptr<int8_t[]> numbers;

    Case(const Input& input, int64_t cols, int64_t outputs = between(1, 200)) : cols(cols), out(outputs) {
        const int64_t block_rows = (out + rows - 1) / rows, block_cols = (input.features + cols - 1) / cols;
        const double density = between(0, 4) / 4.0;
        std::vector<int32_t> starts{0}, columns;
        for (int64_t r = 0; r < block_rows; ++r) {
            for (int64_t c = 0; c < block_cols; ++c) {
                if (std::uniform_real_distribution<>()(generator) < density) columns.push_back(int32_t(c));
            }
            starts.push_back(int32_t(columns.size()));
        }
        crow = exactly(starts);
        col = exactly(columns);
        nnz = int64_t(columns.size());
        weight = noise(int64_t(columns.size()) * rows * cols);
        bias = noise(out);
        scale = noise(out);
        numbers = std::make_unique<int8_t[]>(nnz * rows * cols);
        for (int64_t i = 0; i < nnz * rows * cols; ++i) numbers[i] = int8_t(between(-128, 127));
        y = exactly(std::vector<float>(input.tokens * out, NAN));
    }

    blockprune::Layer layer() const {
        return {weight.get(), crow.get(), col.get(), bias.get(), y.get(), out, out, nnz, rows, cols, 0, nullptr, nullptr, nullptr};
    }

    // The same in int8; `weight` becomes what it stands for.
    blockprune::Layer rounded() {
        for (int64_t r = 0, b = 0; r < (out + rows - 1) / rows; ++r) {
            for (; b < crow[r + 1]; ++b) {
                for (int64_t i = 0; i < rows * cols; ++i) {
                    const int64_t o = r * rows + i / cols;
                    weight[b * rows * cols + i] = o < out ? float(numbers[b * rows * cols + i]) * scale[o] : 0;
                }
            }
        }
        blockprune::Layer small = layer();
        small.weight = numbers.get(), small.weight_scale = scale.get();
        return small;
    }

    bool unpacks(const Input& input) const {
        auto dense = exactly(std::vector<float>(out * input.features, NAN));
        blockprune::Layer target = layer();
        target.y = dense.get();
        if (blockprune_cpu_unpack(input.features, 4, &target, int32_t(between(1, 3)))) return false;
        for (int64_t b = 0, r = 0; r < (out + rows - 1) / rows; ++r) {
            for (; b < crow[r + 1]; ++b) {
                for (int64_t i = 0; i < rows * cols; ++i) {
                    const int64_t o = r * rows + i / cols, k = col[b] * cols + i % cols;
                    if (o >= out || k >= input.features) continue;
                    float& value = dense[o * input.features + k];
                    if (value != weight[b * rows * cols + i]) return false;
                    value = 0;
                }
            }
        }
        return std::all_of(dense.get(), dense.get() + out * input.features, [](float v) { return v == 0; });
    }

    double error(const Input& input) const {
        double error = 0, size = 1e-30;
        for (int64_t t = 0; t < input.tokens; ++t) {
            for (int64_t o = 0; o < out; ++o) {
                double sum = bias[o];
                for (int64_t b = crow[o / rows]; b < crow[o / rows + 1]; ++b) {
                    for (int64_t k = 0; k < cols && col[b] * cols + k < input.features; ++k) {
                        sum += double(input.x[t * input.stride + col[b] * cols + k]) *
                               weight[(b * rows + o % rows) * cols + k];
                    }
                }
                error += (y[t * out + o] - sum) * (y[t * out + o] - sum);
                size += sum * sum;
            }
        }
        return std::sqrt(error / size);
    }
};

bool correct(const char* isa) {
    const Input input;
    const int64_t cols = between(1, 40);
    std::vector<Case> cases;
    std::vector<blockprune::Layer> layers;
    for (int64_t i = between(1, 3); i--;) {
        cases.emplace_back(input, cols);
        layers.push_back(cases.back().layer());
    }
    if (blockprune_cpu_linear(isa, input.x.get(), input.stride, input.tokens, input.features, 0, 0,
                              layers.data(), int64_t(layers.size()), int32_t(between(1, 3)))) {
        return false;
    }
    for (const Case& c : cases) {
        if (!(c.error(input) < 1e-5) || !c.unpacks(input)) return false;
    }
    return true;
}

// Weights in int8, with x of whole numbers, so that rounding changes nothing.
bool rounds(const char* isa) {
    Input input;
    for (int64_t t = 0; t < input.tokens; ++t) {
        for (int64_t k = 0; k < input.features; ++k) input.x[t * input.stride + k] = float(between(-127, 127));
        input.x[t * input.stride + between(0, input.features - 1)] = 127;
    }
    Case one(input, between(1, 40));
    const blockprune::Layer layer = one.rounded();
    if (blockprune_cpu_linear(isa, input.x.get(), input.stride, input.tokens, input.features, 0, 2, &layer, 1,
                              int32_t(between(1, 3)))) {
        return false;
    }
    return one.error(input) < 1e-5;
}

// Halves of a layer touch nothing else than their arrays, and write all of y; tests in Python look at the numbers.
bool halves(const char* isa) {
    const int64_t images = between(1, 3), tokens = between(1, 60), width = between(1, 80), heads = between(0, 3);
    const int64_t size = between(1, 70), hidden = heads ? heads * size : between(1, 150), cols = between(1, 40);
    Input read, passed;
    read.tokens = passed.tokens = images * tokens;
    read.features = read.stride = width, passed.features = passed.stride = hidden;
    const auto x = noise(images * tokens * width), bias = noise(images * tokens);
    const auto weight = noise(width), shift = noise(width), scale = noise(width);
    const auto y = exactly(std::vector<float>(images * tokens * width, NAN));
    const auto seen = exactly(std::vector<float>(images * tokens * width, NAN));
    const bool rounded = between(0, 1), wanted = between(0, 1);
    std::vector<Case> cases;
    std::vector<blockprune::Layer> layers;
    for (int64_t i = heads ? 3 : 1; i--;) cases.emplace_back(read, cols, hidden);
    cases.emplace_back(passed, between(1, 40), width);
    for (Case& c : cases) layers.push_back(rounded ? c.rounded() : c.layer());
    layers.front().activation = heads ? 0 : between(0, 2);
    layers.back().output_scale = between(0, 1) ? scale.get() : nullptr;
    blockprune::Half half{};
    half.x = x.get(), half.y = y.get(), half.read = wanted ? seen.get() : nullptr;
    half.images = images, half.tokens = tokens, half.width = width, half.weights = rounded ? blockprune::INT8 : 0;
    half.norm = {weight.get(), shift.get(), width, 1e-6};
    half.layers = layers.data(), half.num_layers = int64_t(layers.size());
    half.heads = heads, half.head_size = heads ? size : 0, half.scale = 0.1, half.bias = between(0, 1) ? bias.get() : nullptr;
    if (blockprune_cpu_half(isa, &half, int32_t(between(1, 3)))) return false;
    const auto finite = [](float v) { return std::isfinite(v); };
    return std::all_of(y.get(), y.get() + images * tokens * width, finite) &&
           (!wanted || std::all_of(seen.get(), seen.get() + images * tokens * width, finite));
}

// Each token is one at least of as many as there are, and what is said of them adds up to what was there.
bool merges(const char* isa) {
    blockprune::Merge m{};
    const int64_t patches = between(2, 150);
    m.images = between(0, 4), m.prefix = between(0, 3), m.tokens = m.prefix + patches, m.leave = between(1, patches - 1);
    m.width = between(1, 70), m.features = between(1, 70), m.all_tokens = m.tokens + between(0, 9);
    for (m.step = 2; m.candidates() < m.leave;) ++m.step;
    const auto states = noise(m.images * m.tokens * m.width), alike = noise(m.images * m.tokens * m.features);
    const auto sizes = exactly(std::vector<float>(m.images * m.tokens, 1.0f));
    std::vector<int64_t> anywhere(m.images * m.all_tokens);
    for (int64_t& place : anywhere) place = between(0, m.tokens - 1);
    const auto places = exactly(anywhere);
    const auto out_states = exactly(std::vector<float>(m.images * m.kept() * m.width, NAN));
    const auto out_sizes = exactly(std::vector<float>(m.images * m.kept(), NAN));
    const auto out_places = exactly(std::vector<int64_t>(anywhere.size(), -1));
    m.states = states.get(), m.alike = alike.get(), m.sizes = sizes.get(), m.places = places.get();
    m.out_states = out_states.get(), m.out_sizes = out_sizes.get(), m.out_places = out_places.get();
    if (blockprune_cpu_merge(isa, &m, int32_t(between(1, 3)))) return false;
    for (int64_t i = 0; i < m.images * m.all_tokens; ++i) {
        if (out_places[i] < 0 || out_places[i] >= m.kept()) return false;
    }
    for (int64_t i = 0; i < m.images; ++i) {
        for (int64_t k = 0; k < m.width; ++k) {
            double before = 0, after = 0, counted = 0;
            for (int64_t t = 0; t < m.tokens; ++t) before += states[(i * m.tokens + t) * m.width + k];
            for (int64_t t = 0; t < m.kept(); ++t) {
                after += double(out_states[(i * m.kept() + t) * m.width + k]) * out_sizes[i * m.kept() + t];
                counted += out_sizes[i * m.kept() + t];
            }
            if (!(std::abs(before - after) < 1e-4) || counted != double(m.tokens)) return false;
        }
    }
    return true;
}

}  // namespace

int main(int, char** arguments) {
    int checked = 0;
    for (const char* isa : {"baseline", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16"}) {
        if (!blockprune_cpu_isa(isa)) continue;
        for (int i = 0; i < std::atoi(arguments[1]); ++i, ++checked) {
            if (!correct(isa) || !rounds(isa) || !halves(isa) || !merges(isa)) {
                std::printf("%s: case %d is wrong\n", isa, i);
                return 1;
            }
        }
    }
    std::printf("%d products\n", checked);
}
