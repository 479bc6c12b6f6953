#include "merge.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <vector>

#include "threads.h"

namespace blockprune {
namespace {

constexpr int64_t PANELS_BYTES = 4 << 20;  // of the images that are merged at once
constexpr int64_t ROWS_AT_ONCE = 16;
constexpr int64_t PRODUCTS_A_THREAD = 1 << 20;  // below that, starting another thread takes longer

// What is found of one image.
struct Found {
    std::vector<float> best;       // [candidates]
    std::vector<int32_t> targets;  // [candidates]
    std::vector<int32_t> order;    // [candidates], most alike first
    std::vector<int64_t> starts;   // [kept + 1], into parts
    std::vector<Part> parts;       // [tokens], those of each token that is kept
    std::vector<int64_t> moved;    // [tokens], where they are

    void fit(const Merge& m) {
        best.resize(m.candidates());
        targets.resize(m.candidates());
        order.resize(m.candidates());
        starts.resize(m.kept() + 1);
        parts.resize(m.tokens);
        moved.resize(m.tokens);
    }

    void sort() {
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return best[a] > best[b]; });
        // NaN is never found, so the order is one: what is alike nothing has less than any number.
    }

    // Where tokens are once some have left: those before the patches, the candidates that stay, the targets.
    void move(const Merge& m) {
        const int64_t stay = m.candidates() - m.leave;
        for (int64_t t = 0; t < m.prefix; ++t) moved[t] = t;
        for (int64_t i = 0; i < stay; ++i) moved[m.candidate(order[m.leave + i])] = m.prefix + i;
        for (int64_t t = 0; t < m.targets(); ++t) moved[m.target(t)] = m.prefix + stay + t;
        for (int64_t i = 0; i < m.leave; ++i) moved[m.candidate(order[i])] = m.prefix + stay + targets[order[i]];
    }

    // The token that stays comes first, then those that went into it, most alike first.
    void collect(const Merge& m, const float* sizes, float* out_sizes) {
        std::fill(starts.begin(), starts.end(), 0);
        std::fill(out_sizes, out_sizes + m.kept(), 0.0f);
        for (int64_t t = 0; t < m.tokens; ++t) ++starts[moved[t] + 1];
        std::partial_sum(starts.begin(), starts.end(), starts.begin());
        const auto put = [&](int64_t token) {
            parts[starts[moved[token]]++] = {token, sizes[token]};
            out_sizes[moved[token]] += sizes[token];
        };
        for (int64_t t = 0; t < m.prefix; ++t) put(t);
        for (int64_t i = m.leave; i < m.candidates(); ++i) put(m.candidate(order[i]));
        for (int64_t t = 0; t < m.targets(); ++t) put(m.target(t));
        for (int64_t i = 0; i < m.leave; ++i) put(m.candidate(order[i]));
        std::copy_backward(starts.begin(), starts.end() - 1, starts.end());  // each was moved on to the next one's
        starts[0] = 0;
        for (int64_t row = 0; row < m.kept(); ++row) {
            for (int64_t i = starts[row]; i < starts[row + 1]; ++i) parts[i].share /= out_sizes[row];
        }
    }
};

// Some images, in steps that all threads end before the next begins.
struct Work {
    const MergeKernels& kernels;
    const Merge& merge;
    const int64_t first, images, panels, panel_floats;
    std::vector<float>& memory;
    std::vector<Found>& found;
    std::atomic<bool> bad_places{false};
    std::atomic<int64_t> next_panel{0}, next_tile{0}, next_image{0}, next_rows{0};

    void pack() {
        for (int64_t i; (i = next_panel.fetch_add(1)) < images * panels;) {
            kernels.pack_targets(merge, first + i / panels, i % panels, memory.data() + i * panel_floats);
        }
    }

    void compare() {
        const int64_t tiles = divide_up(merge.candidates(), kernels.tile_candidates);
        for (int64_t i; (i = next_tile.fetch_add(1)) < images * tiles;) {
            const int64_t image = i / tiles, candidate = i % tiles * kernels.tile_candidates;
            Found& own = found[image];
            kernels.find_nearest(merge, first + image, candidate, memory.data() + image * panels * panel_floats,
                                 &own.best[candidate], &own.targets[candidate]);
        }
    }

    void choose() {
        for (int64_t i; (i = next_image.fetch_add(1)) < images;) {
            const int64_t image = first + i;
            found[i].sort();
            found[i].move(merge);
            found[i].collect(merge, merge.sizes + image * merge.tokens, merge.out_sizes + image * merge.kept());
            const int64_t* places = merge.places + image * merge.all_tokens;
            int64_t* out_places = merge.out_places + image * merge.all_tokens;
            for (int64_t p = 0; p < merge.all_tokens; ++p) {
                const bool inside = 0 <= places[p] && places[p] < merge.tokens;
                if (!inside) bad_places = true;
                out_places[p] = inside ? found[i].moved[places[p]] : 0;
            }
        }
    }

    void add() {
        const int64_t chunks = divide_up(merge.kept(), ROWS_AT_ONCE);
        for (int64_t i; (i = next_rows.fetch_add(1)) < images * chunks;) {
            const Found& own = found[i / chunks];
            const int64_t begin = i % chunks * ROWS_AT_ONCE, end = std::min(begin + ROWS_AT_ONCE, merge.kept());
            for (int64_t row = begin; row < end; ++row) {
                const int64_t start = own.starts[row];
                kernels.add_parts(merge, first + i / chunks, &own.parts[start], own.starts[row + 1] - start, row);
            }
        }
    }

    void alone() {
        pack();
        compare();
        choose();
        add();
    }
};

void together(void* argument) {
    Work& work = *static_cast<Work*>(argument);
    work.pack();
    threads().barrier();
    work.compare();
    threads().barrier();
    work.choose();
    threads().barrier();
    work.add();
}

}  // namespace

Status merge(const MergeKernels& kernels, const Merge& merge, int32_t num_threads) {
    // Kept for the next call: fresh memory costs page faults.
    thread_local std::vector<float> memory;
    thread_local std::vector<Found> found;
    const int64_t panels = divide_up(merge.targets(), kernels.panel_targets);
    const int64_t panel_floats = kernels.panel_targets * (merge.features + 1);
    const int64_t image_bytes = panels * panel_floats * int64_t(sizeof(float));
    const int64_t at_once = std::min(merge.images, std::max<int64_t>(1, PANELS_BYTES / image_bytes));
    memory.resize(at_once * panels * panel_floats);
    if (int64_t(found.size()) < at_once) found.resize(at_once);
    for (int64_t i = 0; i < at_once; ++i) found[i].fit(merge);
    for (int64_t first = 0; first < merge.images; first += at_once) {
        const int64_t images = std::min(at_once, merge.images - first);
        Work work{kernels, merge, first, images, panels, panel_floats, memory, found};
        const int64_t products = images * merge.candidates() * merge.targets() * merge.features;
        const int64_t useful = std::min<int64_t>(num_threads, products / PRODUCTS_A_THREAD);
        if (threads().found() && useful > 1) threads().parallel(together, &work, unsigned(useful), 0);
        else work.alone();
        if (work.bad_places) return BAD_INDICES;
    }
    return DONE;
}

}  // namespace blockprune
