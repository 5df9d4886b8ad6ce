#pragma once

#include <cstdlib>
#include <new>

#include "kernels.h"

namespace af3 {

// Memory on a line's boundary; throws std::bad_alloc.
template <class T>
class Buffer {
  public:
    explicit Buffer(size_t count)
        : data_(static_cast<T*>(aligned_alloc(kLine, (count * sizeof(T) / kLine + 1) * kLine))) {
        if (!data_) throw std::bad_alloc();
    }
    ~Buffer() { free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* get() const { return data_; }

  private:
    T* const data_;
};

}  // namespace af3
