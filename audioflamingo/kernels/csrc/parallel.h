// Threads: the OpenMP runtime that the process already has (torch's), so that both share one pool.
//
// GOMP_parallel is looked up when first needed, in place of linking a runtime: a second one would fight the first for
// the cores. libgomp and LLVM's and Intel's libomp export it. Without it the work runs on the calling thread.

#pragma once

#include <atomic>
#include <cstdint>

namespace af3 {

// Hands out items 0..count-1, each once, to whichever thread asks first.
class Items {
  public:
    explicit Items(int64_t count) : count_(count) {}
    bool next(int64_t* item) { return (*item = next_.fetch_add(1, std::memory_order_relaxed)) < count_; }
    int slot() { return slots_.fetch_add(1, std::memory_order_relaxed); }

  private:
    std::atomic<int64_t> next_{0};
    std::atomic<int> slots_{0};
    const int64_t count_;
};

// Runs `body(data)` on up to `threads` threads at once and waits for all.
void run_threads(int threads, void (*body)(void*), void* data);

// Calls `work(item, slot)` for every item; `slot` < threads numbers the thread.
template <class Work>
void parallel_for(int threads, int64_t count, Work work) {
    struct Shared {
        Items items;
        Work& work;
    } shared{Items(count), work};
    run_threads(
        count < threads ? int(count) : threads,
        [](void* data) {
            Shared& mine = *static_cast<Shared*>(data);
            const int slot = mine.items.slot();
            for (int64_t item; mine.items.next(&item);) mine.work(item, slot);
        },
        &shared);
}

}  // namespace af3
