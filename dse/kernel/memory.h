// Memory for one call, from one allocation that begins with a cache line: vectors that lie across two lines are read
// twice.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <new>

constexpr int64_t LINE = 16;  // floats in a cache line

struct Memory {
    float *at;

    explicit Memory(int64_t size) : at(new (ALIGNED) float[size]) {}
    ~Memory() { ::operator delete[](at, ALIGNED); }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;

  private:
    static constexpr std::align_val_t ALIGNED{LINE * sizeof(float)};
};

// What is left of some memory; hands out the parts one after the other.
struct Room {
    float *next;

    float *take(int64_t size) {
        float *taken = next;
        next += of({size});
        return taken;
    }
    static int64_t of(std::initializer_list<int64_t> sizes) {
        int64_t sum = 0;
        for (int64_t size : sizes) sum += (size + LINE - 1) / LINE * LINE;
        return sum;
    }
};
