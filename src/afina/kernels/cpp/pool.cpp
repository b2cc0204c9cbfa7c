#include "pool.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <string>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace {

using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Library {
    std::string path = "own";
    Fork fork = nullptr;
};

Library find() {
    Library found;
#if defined(__linux__)
    auto look = [](dl_phdr_info* info, size_t, void* data) {
        auto& found = *static_cast<Library*>(data);
        std::string path = info->dlpi_name ? info->dlpi_name : "";
        std::string name = path.substr(path.rfind('/') + 1);
        if (name.rfind("libgomp", 0) && name.rfind("libiomp", 0) && name.rfind("libomp", 0)) return 0;
        void* handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
        found.fork = handle ? reinterpret_cast<Fork>(dlsym(handle, "GOMP_parallel")) : nullptr;
        if (!found.fork) return 0;
        found.path = path;
        return 1;
    };
    dl_iterate_phdr(look, &found);
#endif
    return found;
}

const Library& library() {
    static const Library found = find();
    return found;
}

struct Job {
    Task task;
    const void* args;
    i64 items, pieces;
    std::atomic<i64> next{0};
};

// Pieces are claimed, not dealt out: a core that is busy elsewhere does fewer of them.
void work(void* data) {
    auto& job = *static_cast<Job*>(data);
    for (i64 i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.pieces;)
        job.task(job.args, i * job.items / job.pieces, (i + 1) * job.items / job.pieces);
}

struct Scratch {
    void* memory = nullptr;
    i64 size = 0;
    ~Scratch() { std::free(memory); }
};

}  // namespace

void run(int threads, i64 items, i64 grain, Task task, const void* args) {
    i64 pieces = std::min<i64>(items / std::max<i64>(1, grain), 4 * i64(threads));
    if (items <= 0) return;
    if (threads <= 1 || pieces <= 1) return task(args, 0, items);
    Job job{task, args, items, pieces};
    unsigned count = unsigned(std::min<i64>(threads, pieces));
    if (library().fork) return library().fork(work, &job, count, 0);
    std::vector<std::thread> others;
    for (unsigned i = 1; i < count; i++) others.emplace_back(work, &job);
    work(&job);
    for (auto& thread : others) thread.join();
}

void* scratch(Slot slot, i64 bytes) {
    static thread_local Scratch slots[kSlots];
    Scratch& kept = slots[slot];
    if (bytes > kept.size) {
        std::free(kept.memory);
        kept.size = (bytes + 4095) / 4096 * 4096;
        kept.memory = std::aligned_alloc(64, kept.size);
        if (!kept.memory) {
            kept.size = 0;
            throw std::bad_alloc();
        }
    }
    return kept.memory;
}

const char* threads_of() { return library().path.c_str(); }
