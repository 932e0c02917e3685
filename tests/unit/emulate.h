// Runs the CUDA sources on the CPU, one thread of the host for each thread of a block, blocks in turn: for testing
// their indices and reductions where there is no GPU. Not for speed, and without warp-level operations.
#pragma once

#include <barrier>
#include <cmath>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static

struct Dimension {
  unsigned int x = 1;
};
inline thread_local Dimension threadIdx;
inline thread_local Dimension blockIdx;
inline Dimension blockDim, gridDim;
inline std::unique_ptr<std::barrier<>> block_barrier;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

template <typename Body>
void emulate(unsigned int grid, unsigned int block, const Body& body) {
  gridDim.x = grid;
  blockDim.x = block;
  block_barrier = std::make_unique<std::barrier<>>(block);
  std::vector<std::thread> threads;
  for (unsigned int t = 0; t < block; ++t) {
    threads.emplace_back([&, t] {
      threadIdx.x = t;
      for (unsigned int b = 0; b < grid; ++b) {
        blockIdx.x = b;
        body();
        __syncthreads();  // shared memory belongs to one block at a time
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

#define DAT_LAUNCH(kernel, grid, block, stream, ...) ((void)(stream), emulate((grid), (block), [&] { kernel(__VA_ARGS__); }))
#define DAT_LAST_ERROR() 0
