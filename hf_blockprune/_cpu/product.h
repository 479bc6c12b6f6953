// Some tokens of a product, cut into panels that threads share out.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels.h"

namespace blockprune {

constexpr int64_t GROUP_BYTES = 512 << 10;  // of panels that stay in a core's cache while all strips pass by
constexpr int64_t ITEMS_A_THREAD = 8;       // enough for the threads to end at about the same time

// Panels of nearly equal size, in groups. Every step may be taken by any number of threads at once, one after the other.
class Product {
public:
    // Args: tokens of x and of y that it begins with, how many, and memory for `floats` numbers.
    void begin(const Isa& isa, const Input& input, const std::vector<Strip>& strips, int64_t x_first, int64_t y_first,
               int64_t tokens, float* memory, int32_t num_threads) {
        isa_ = &isa, input_ = &input, strips_ = &strips, memory_ = memory;
        x_first_ = x_first, y_first_ = y_first, tokens_ = tokens;
        panel_floats_ = panel_floats(isa, input);
        panels_ = divide_up(tokens, isa.panel_tokens);
        const int64_t bytes = panel_floats_ * int64_t(sizeof(float)), count = std::max<int64_t>(1, int64_t(strips.size()));
        const int64_t cached = divide_up(panels_, std::max<int64_t>(1, GROUP_BYTES / bytes));
        const int64_t shared = num_threads > 1 ? divide_up(ITEMS_A_THREAD * num_threads, count) : 1;
        groups_ = std::min(panels_, std::max(cached, shared));
    }

    static int64_t panel_floats(const Isa& isa, const Input& input) {
        return (input.block_cols * input.column_words + 1) * isa.panel_stride;
    }

    static int64_t floats(const Isa& isa, const Input& input, int64_t tokens) {
        return divide_up(tokens, isa.panel_tokens) * panel_floats(isa, input);
    }

    void pack_weights() {
        const int64_t count = int64_t(strips_->size());
        for (int64_t s; (s = next_strip_.fetch_add(1)) < count;) isa_->pack_weights(*input_, (*strips_)[s]);
    }

    void pack_inputs() {
        each_panel([&](int64_t p) { isa_->pack_inputs(*input_, x_first_ + start(p), count(p), at(p)); });
    }

    // Args: makes rows [count, features] of some tokens of x, contiguous, and says where they are.
    template <class Rows>
    void pack_rows(Rows rows) {
        each_panel([&](int64_t p) {
            Input made = *input_;
            made.x = rows(x_first_ + start(p), count(p));
            made.stride = made.in_features;
            isa_->pack_inputs(made, 0, count(p), at(p));
        });
    }

    void multiply() {
        const int64_t each = int64_t(strips_->size());
        for (int64_t item; (item = next_item_.fetch_add(1)) < groups_ * each;) {
            const int64_t group = item / each;
            for (int64_t p = panels_ * group / groups_; p < panels_ * (group + 1) / groups_; ++p) {
                isa_->multiply(*input_, (*strips_)[item % each], y_first_ + start(p), count(p), at(p));
            }
        }
    }

private:
    template <class Do>
    void each_panel(Do work) {
        for (int64_t p; (p = next_panel_.fetch_add(1)) < panels_;) work(p);
    }

    int64_t start(int64_t panel) const { return tokens_ * panel / panels_; }
    int32_t count(int64_t panel) const { return int32_t(start(panel + 1) - start(panel)); }
    float* at(int64_t panel) const { return memory_ + panel * panel_floats_; }

    const Isa* isa_ = nullptr;
    const Input* input_ = nullptr;
    const std::vector<Strip>* strips_ = nullptr;
    float* memory_ = nullptr;
    int64_t x_first_ = 0, y_first_ = 0, tokens_ = 0, panels_ = 0, groups_ = 0, panel_floats_ = 0;
    std::atomic<int64_t> next_strip_{0}, next_panel_{0}, next_item_{0};
};

}  // namespace blockprune
