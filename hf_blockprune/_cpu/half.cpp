// Half of a layer as steps that all threads take together, some images at a time, so that what passes from one step to the
// next stays in the cache.

#include "half.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "product.h"
#include "strips.h"
#include "threads.h"
#include "workspace.h"

namespace blockprune {
namespace {

constexpr int64_t CHUNK_BYTES = 3 << 19;  // a thread, of what passes between steps: about what its core keeps
constexpr int64_t ALIGNED = 16;           // numbers in a cache line

int64_t aligned(int64_t floats) { return divide_up(floats, ALIGNED) * ALIGNED; }

// What is done with some images.
struct Step {
    Product first, second;
    Attention attention{};
    std::atomic<int64_t> next_head{0};
};

class Run {
public:
    Run(const Isa& isa, const Half& half, Strips& first, Strips& second, int32_t num_threads)
        : isa_(isa), half_(half), first_strips_(first), second_strips_(second),
          num_threads_(threads().found() ? num_threads : 1) {}

    Status run() {
        if (!prepare()) return BAD_INDICES;
        if (!half_.images || !half_.tokens) return DONE;
        if (!allocate()) return NO_MEMORY;
        for (int64_t c = 0; c < chunks_; ++c) begin(c);
        if (num_threads_ > 1) threads().parallel(work, this, unsigned(num_threads_), 0);
        else work(this);
        return DONE;
    }

private:
    int64_t hidden() const { return firsts_.front().out_features; }  // numbers of a token that pass from first to second
    int64_t element() const { return half_.dtype == BFLOAT16 ? 2 : 4; }

    Input input_of(const void* x, int64_t features, const Layer& layer) const {
        const int64_t block_cols = divide_up(features, layer.cols);
        Input input{x, features, 0, features, layer.cols, block_cols, int32_t(half_.dtype), int32_t(half_.weights)};
        input.column_words = isa_.column_words(input);
        return input;
    }

    // Whether all indices keep the format's rules.
    bool prepare() {
        firsts_.assign(half_.layers, half_.layers + half_.num_layers - 1);
        second_ = half_.layers[half_.num_layers - 1];
        first_input_ = input_of(half_.x, half_.width, firsts_.front());
        // What is rounded to int8 before and after may be rounded to bfloat16 between.
        first_input_.halves = half_.heads && half_.weights == INT8 && half_.dtype == FLOAT32 && isa_.halves->multiplies_pairs;
        second_input_ = input_of(nullptr, hidden(), second_);
        second_.y = half_.y, second_.y_stride = half_.width, second_.residual = half_.x;
        return first_strips_.cut(firsts_.data(), int64_t(firsts_.size()), first_input_.block_cols, isa_.strip_rows) &&
               second_strips_.cut(&second_, 1, second_input_.block_cols, isa_.strip_rows);
    }

    bool allocate() {
        const int64_t buffers = int64_t(firsts_.size()) + (half_.heads ? 1 : 0);
        const int64_t image_floats = half_.tokens * hidden() * buffers * element() / 4;
        const int64_t most = std::max<int64_t>(1, num_threads_ * CHUNK_BYTES / 4 / std::max<int64_t>(1, image_floats));
        chunks_ = divide_up(half_.images, most);
        chunk_images_ = divide_up(half_.images, chunks_);
        const int64_t tokens = chunk_images_ * half_.tokens;
        const int64_t panels = Product::floats(isa_, first_input_, tokens);
        const int64_t second_panels = Product::floats(isa_, second_input_, tokens);
        const int64_t buffer = aligned(tokens * hidden() * element() / 4 + 1);
        const int64_t first_weights = aligned(first_strips_.floats(first_input_.column_words));
        const int64_t second_weights = aligned(second_strips_.floats(second_input_.column_words));
        attention_floats_ = half_.heads ? aligned(isa_.halves->attention_floats(attention())) : 0;
        row_floats_ = half_.read ? 0 : aligned(isa_.panel_tokens * half_.width);
        own_floats_ = std::max(attention_floats_, row_floats_);
        float* memory = workspace(panels + second_panels + buffer * buffers + first_weights + second_weights +
                                  own_floats_ * num_threads_);
        if (!memory) return false;
        first_panels_ = memory, second_panels_ = memory + panels, memory = second_panels_ + second_panels;
        for (int64_t b = 0; b < buffers; ++b, memory += buffer) buffers_.push_back(memory);
        first_strips_.place(memory, first_input_.column_words);
        second_strips_.place(memory + first_weights, second_input_.column_words);
        own_ = memory + first_weights + second_weights;
        for (size_t i = 0; i < firsts_.size(); ++i) first_strips_.write_to(i, buffers_[i], hidden());
        second_input_.x = buffers_.back();
        steps_ = std::vector<Step>(size_t(chunks_));
        return true;
    }

    Attention attention() const {
        Attention a{};
        a.tokens = half_.tokens, a.heads = half_.heads, a.head_size = half_.head_size, a.stride = hidden();
        a.dtype = int32_t(half_.dtype), a.halves = first_input_.halves, a.scale = float(half_.scale);
        return a;
    }

    void begin(int64_t chunk) {
        Step& step = steps_[size_t(chunk)];
        const int64_t image = half_.images * chunk / chunks_, images = half_.images * (chunk + 1) / chunks_ - image;
        const int64_t first = image * half_.tokens, tokens = images * half_.tokens;
        step.first.begin(isa_, first_input_, first_strips_.longest_first(), first, 0, tokens, first_panels_, num_threads_);
        step.second.begin(isa_, second_input_, second_strips_.longest_first(), 0, first, tokens, second_panels_, num_threads_);
        if (!half_.heads) return;
        step.attention = attention();
        step.attention.q = buffers_[0], step.attention.k = buffers_[1], step.attention.v = buffers_[2];
        step.attention.y = buffers_[3], step.attention.images = images;
        step.attention.bias = half_.bias ? half_.bias + first : nullptr;
    }

    static void work(void* argument) {
        Run& run = *static_cast<Run*>(argument);
        float* own = run.own_ + run.own_floats_ * run.next_thread_.fetch_add(1);
        for (Step& step : run.steps_) run.take(step, &step == &run.steps_.front(), own);
    }

    void wait() const {
        if (num_threads_ > 1) threads().barrier();
    }

    void take(Step& step, bool is_first, float* own) {
        if (is_first) {
            step.first.pack_weights();
            step.second.pack_weights();
        }
        step.first.pack_rows([&](int64_t token, int32_t count) { return normalised(token, count, own); });
        wait();
        step.first.multiply();
        wait();
        if (half_.heads) {
            attend(step, own);
            wait();
        }
        step.second.pack_inputs();
        wait();
        step.second.multiply();
    }

    const void* normalised(int64_t token, int32_t count, float* own) const {
        const int64_t offset = token * half_.width * element();
        void* rows = half_.read ? static_cast<char*>(half_.read) + offset : static_cast<void*>(own);
        isa_.halves->normalise(half_.norm, int32_t(half_.dtype), static_cast<const char*>(half_.x) + offset, count, rows);
        return rows;
    }

    // A head's queries are cut up where there are fewer heads than threads could share.
    void attend(Step& step, float* own) const {
        const Attention& a = step.attention;
        const int64_t heads = a.images * a.heads;
        const int64_t wanted = num_threads_ > 1 ? divide_up(ITEMS_A_THREAD * num_threads_ / 2, heads) : 1;
        const int64_t pieces = std::min(wanted, divide_up(a.tokens, 2 * isa_.panel_tokens));
        for (int64_t item; (item = step.next_head.fetch_add(1)) < heads * pieces;) {
            const int64_t head = item / pieces, piece = item % pieces;
            isa_.halves->attend(a, head / a.heads, head % a.heads, a.tokens * piece / pieces,
                                a.tokens * (piece + 1) / pieces, own);
        }
    }

    const Isa& isa_;
    const Half& half_;
    Strips &first_strips_, &second_strips_;
    const int32_t num_threads_;
    std::vector<Layer> firsts_;
    Layer second_{};
    Input first_input_{}, second_input_{};
    int64_t chunks_ = 0, chunk_images_ = 0, attention_floats_ = 0, row_floats_ = 0, own_floats_ = 0;
    float *first_panels_ = nullptr, *second_panels_ = nullptr, *own_ = nullptr;
    std::vector<float*> buffers_;
    std::vector<Step> steps_;
    std::atomic<int64_t> next_thread_{0};
};

}  // namespace

int32_t run_half(const Isa& isa, const Half& half, int32_t num_threads) {
    thread_local Strips first, second;  // which keep their memory for the next call
    return Run(isa, half, first, second, num_threads).run();
}

}  // namespace blockprune
