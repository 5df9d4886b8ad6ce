#include "parallel.h"

#include <dlfcn.h>

namespace af3 {

void run_threads(int threads, void (*body)(void*), void* data) {
    using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
    static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (threads > 1 && parallel) {
        parallel(body, data, unsigned(threads), 0);
    } else {
        body(data);
    }
}

}  // namespace af3
