// Random products of odd shapes through the C ABI, compared with plain loops in double precision. Built with sanitizers,
// and with every array exactly as large as the kernels may touch.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

extern "C" {
const char* blockprune_cpu_isa(const char*);
int32_t blockprune_cpu_strip_rows(const char*, int32_t);
int32_t blockprune_cpu_linear(
    const char*, const void*, const void*, const int32_t*, const int32_t*, const void*, void*, const int32_t*, int64_t,
    int64_t, int64_t, int64_t, int64_t, int32_t, int32_t, int32_t, int32_t, int32_t);
}

static std::mt19937 generator(0);

static int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

static float value() { return std::normal_distribution<float>()(generator); }

template <typename T>
static std::unique_ptr<T[]> exactly(const std::vector<T>& values) {  // a vector may own more than it shows
    auto copy = std::make_unique<T[]>(values.size());
    for (size_t i = 0; i < values.size(); ++i) copy[i] = values[i];
    return copy;
}

static double product(const char* isa) {
    const int64_t rows = 16 * between(1, 5), cols = between(1, 40);
    const int64_t out = between(1, 200), in = between(1, 200), tokens = between(0, 70), threads = between(1, 3);
    const int64_t block_rows = (out + rows - 1) / rows, block_cols = (in + cols - 1) / cols;
    const double density = between(0, 4) / 4.0;
    std::vector<int32_t> crow{0}, col;
    for (int64_t r = 0; r < block_rows; ++r) {
        for (int64_t c = 0; c < block_cols; ++c) {
            if (std::uniform_real_distribution<>()(generator) < density) col.push_back(int32_t(c));
        }
        crow.push_back(int32_t(col.size()));
    }
    const int64_t stride = in + between(0, 3);
    std::vector<float> weight(col.size() * rows * cols), x(tokens ? (tokens - 1) * stride + in : 0), bias(out);
    for (auto* values : {&weight, &x, &bias}) for (float& v : *values) v = value();
    std::vector<int32_t> order;
    for (int64_t s = 0; s < block_rows * (rows / blockprune_cpu_strip_rows(isa, int32_t(rows))); ++s) order.push_back(int32_t(s));
    const auto y = exactly(std::vector<float>(tokens * out, NAN));
    const auto weight_ = exactly(weight), x_ = exactly(x), bias_ = exactly(bias);
    const auto crow_ = exactly(crow), col_ = exactly(col), order_ = exactly(order);
    if (blockprune_cpu_linear(isa, x_.get(), weight_.get(), crow_.get(), col_.get(), bias_.get(), y.get(), order_.get(),
                              stride, out, tokens, in, out, int32_t(rows), int32_t(cols), 0, 0, int32_t(threads))) {
        std::abort();
    }
    double error = 0, size = 1e-30;
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t o = 0; o < out; ++o) {
            double sum = bias[o];
            for (int64_t b = crow[o / rows]; b < crow[o / rows + 1]; ++b) {
                for (int64_t k = 0; k < cols && col[b] * cols + k < in; ++k) {
                    sum += double(x[t * stride + col[b] * cols + k]) * weight[(b * cols + k) * rows + o % rows];
                }
            }
            error += (y[t * out + o] - sum) * (y[t * out + o] - sum);
            size += sum * sum;
        }
    }
    return std::sqrt(error / size);
}

int main(int, char** arguments) {
    int checked = 0;
    for (const char* isa : {"baseline", "avx2", "avx512"}) {
        if (!blockprune_cpu_isa(isa)) continue;
        for (int i = 0; i < std::atoi(arguments[1]); ++i, ++checked) {
            const double error = product(isa);
            if (!(error < 1e-5)) {
                std::printf("%s, case %d: relative error %g\n", isa, i, error);
                return 1;
            }
        }
    }
    std::printf("%d products\n", checked);
}
