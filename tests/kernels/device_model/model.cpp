// The rules of the hardware, for cuda_runtime.h and the files beside it.
//
// Every thread of every block is a fiber; all blocks run at once, in an order drawn from a seed. Where the hardware may
// choose when something happens, the model takes the moment that hurts most: TMA writes at once, the tensor cores read
// shared memory only when somebody waits for them. What no hardware would survive ends the kernel with a message: a
// deadlock, too many arrivals at a barrier, a misaligned address, shared memory read by the tensor cores that ordinary
// stores wrote without a fence.
#include <ucontext.h>

#include <array>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cuda.h"
#include "cuda_bf16.h"
#include "cuda_runtime.h"
#include "grouped_gemm/matrix.cuh"
#include "grouped_gemm/tma.cuh"
#include "grouped_gemm/wgmma.cuh"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr int kStackBytes = 128 << 10;
constexpr int kSharedBytes = 232448;

struct Barrier {  // an mbarrier
  int expected, missing;
  int64_t bytes = 0;
  uint32_t phase = 0;
};

struct Rendezvous {  // of a warp, a block, a cluster
  int arrived = 0;
  uint32_t generation = 0;
};

using Words = std::array<uint32_t, 8>;

struct Warp {
  Rendezvous meeting;
  Words words[2][32];
};

struct Block {
  std::unique_ptr<uint8_t[]> allocation{new uint8_t[kSharedBytes + 1024]};
  uint8_t* memory;
  std::map<uint32_t, Barrier> barriers;
  std::vector<Warp> warps;
  Rendezvous everybody, named;
  int running = 0;              // threads that have not ended
  std::set<uint32_t> unfenced;  // 16-byte chunks that ordinary stores wrote and no fence followed
};

struct Product {
  float* d;
  uint64_t a, b;
  bool add, a_k_major, b_k_major;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int block, thread;
  bool done = false;
  std::vector<Product> open;                  // not yet committed
  std::vector<std::vector<Product>> pending;  // committed groups, oldest first
  std::vector<uint32_t> stored;               // chunks since this thread's last fence
  bool fenced = false;                        // wgmma_fence since the last wait for all products
};

std::vector<Block> blocks;
std::vector<Rendezvous> clusters;
std::vector<Fiber> fibers;
Fiber* current;
ucontext_t scheduler;
const std::function<void()>* entry;
int blocks_of_cluster;
int64_t progress;
std::string problem;
uint32_t seed = 1;
int multiprocessors = 4;

void to_scheduler() { swapcontext(&current->context, &scheduler); }

[[noreturn]] void fail(const std::string& what) {
  if (problem.empty())
    problem = what + " (block " + std::to_string(current->block) + ", thread " + std::to_string(current->thread) + ")";
  for (;;) to_scheduler();
}

void require(bool condition, const char* what) {
  if (!condition) fail(what);
}

template <class Condition>
void block_until(Condition condition) {
  while (!condition()) to_scheduler();
  ++progress;
}

Block& this_block() { return blocks[current->block]; }
Warp& this_warp() { return this_block().warps[current->thread / 32]; }
int this_lane() { return current->thread % 32; }

void meet(Rendezvous& meeting, int count) {
  const uint32_t generation = meeting.generation;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.generation;
    ++progress;
  } else {
    block_until([&] { return meeting.generation != generation; });
  }
}

// Every lane's words, by lane.
const Words* exchange(const Words& mine) {
  Warp& warp = this_warp();
  Words* const slot = warp.words[warp.meeting.generation % 2];
  slot[this_lane()] = mine;
  meet(warp.meeting, 32);
  return slot;
}

uint8_t* at(Block& block, uint32_t address, uint32_t bytes, uint32_t alignment) {
  require(address % alignment == 0, "misaligned shared address");
  require(address + bytes <= kSharedBytes, "shared address out of range");
  return block.memory + address;
}

void settle(Barrier& barrier) {
  require(barrier.missing >= 0, "more arrivals at a barrier than it expects");
  if (barrier.missing == 0 && barrier.bytes == 0) {
    barrier.missing = barrier.expected;
    ++barrier.phase;
    ++progress;
  }
}

Barrier& barrier_at(Block& block, uint32_t address) {
  require(block.running > 0, "the block of that barrier has ended");
  const auto found = block.barriers.find(address);
  require(found != block.barriers.end(), "no barrier was initialised there");
  return found->second;
}

float bfloat16_at(const uint8_t* pointer) {
  __nv_bfloat16 value;
  std::memcpy(&value, pointer, 2);
  return value;
}

// The address of element (mn, k) of a wgmma operand by its descriptor, 128-byte swizzle. PTX ISA, "Strides": an atom is
// 8 rows of 128 bytes. K-major: rows are M or N, the stride offset leads from atom to atom along M or N. MN-major: rows
// are K, the leading offset leads along M or N, the stride offset along K. Bits 4..6 of the address are exclusive-ored
// with bits 7..9.
uint32_t operand_address(uint64_t descriptor, bool k_major, int mn, int k) {
  const uint32_t start = (descriptor & 0x3FFF) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
  const uint32_t linear =
      k_major ? mn / 8 * stride + mn % 8 * 128 + k * 2 : mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * 128;
  const uint32_t address = start + linear;
  return address ^ ((address >> 7 & 7) << 4);
}

void multiply(const Product& product) {
  const int thread = current->thread % 128;
  Block& block = this_block();
  static float a[2][16], b[64][16];  // used before anybody else runs
  const auto fetch = [&](uint64_t descriptor, bool k_major, int mn, int k) {
    const uint32_t address = operand_address(descriptor, k_major, mn, k);
    require(block.unfenced.count(address / 16) == 0, "the tensor cores read what no fence made visible");
    return bfloat16_at(at(block, address, 2, 2));
  };
  const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < 2; ++i) a[i][k] = fetch(product.a, product.a_k_major, row + i * 8, k);
    for (int j = 0; j < 64; ++j) b[j][k] = fetch(product.b, product.b_k_major, j / 2 * 8 + column + j % 2, k);
  }
  for (int j = 0; j < 64; ++j)
    for (int i = 0; i < 2; ++i) {
      // n8 block j / 2 has four accumulators: two columns of the upper row, then of the lower one.
      float& d = product.d[j / 2 * 4 + i * 2 + j % 2];
      float sum = product.add ? d : 0.f;
      for (int k = 0; k < 16; ++k) sum += a[i][k] * b[j][k];
      d = sum;
    }
}

void load(const CUtensorMap& map, Block& block, uint32_t destination, uint32_t barrier, int x, int y, int z) {
  require(destination % 1024 == 0, "a swizzled box must start at a multiple of 1024");
  uint8_t* const to = at(block, destination, map.box[0] * map.box[1] * 2, 1024);
  for (int row = 0; row < map.box[1]; ++row)
    for (int column = 0; column < map.box[0]; ++column) {
      const int64_t position[] = {int64_t(x) + column, int64_t(y) + row, z};
      bool inside = true;
      const uint8_t* from = map.data;
      for (int i = 0; i < 3; ++i) {
        inside = inside && position[i] >= 0 && position[i] < map.sizes[i];
        from += position[i] * map.strides[i];
      }
      uint16_t bits = 0;
      if (inside) std::memcpy(&bits, from, 2);
      const int chunk = column / 8 ^ row % 8;
      std::memcpy(to + row * 128 + chunk * 16 + column % 8 * 2, &bits, 2);
    }
  for (uint32_t chunk = destination / 16; chunk < destination / 16 + map.box[0] * map.box[1] / 8; ++chunk)
    block.unfenced.erase(chunk);
  Barrier& waited = barrier_at(block, barrier);
  waited.bytes -= map.box[0] * map.box[1] * 2;
  settle(waited);
}

void run_fiber() {
  (*entry)();
  current->done = true;
  --this_block().running;
  ++progress;
  for (;;) to_scheduler();
}

}  // namespace

cudaError_t run_kernel(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  const int threads = config.blockDim.x, count = config.gridDim.x;
  blocks_of_cluster = config.numAttrs ? config.attrs[0].val.clusterDim.x : 1;
  problem.clear();
  if (config.dynamicSmemBytes > kSharedBytes || count % blocks_of_cluster || threads % 32) return cudaErrorInvalidValue;
  entry = &thread;
  blocks = std::vector<Block>(count);
  clusters = std::vector<Rendezvous>(count / blocks_of_cluster);
  fibers = std::vector<Fiber>(count * threads);
  for (Block& block : blocks) {
    block.warps = std::vector<Warp>(threads / 32);
    block.running = threads;
    block.memory = block.allocation.get() + (1024 - reinterpret_cast<uintptr_t>(block.allocation.get()) % 1024);
    std::memset(block.memory, 0xFF, kSharedBytes);  // NaN, until somebody writes
  }
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber.block = i / threads;
    fiber.thread = i % threads;
    fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStackBytes};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  std::vector<Fiber*> alive;
  for (Fiber& fiber : fibers) alive.push_back(&fiber);
  std::mt19937 random(seed);
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  bool stuck = false;
  int only = 0;
  while (!alive.empty() && problem.empty()) {
    const int64_t before = progress;
    std::shuffle(alive.begin(), alive.end(), random);
    // With an odd seed one block runs ahead of the others until all its threads wait; then all run once, then another.
    const bool all = seed % 2 == 0 || stuck;
    if (all) only = alive[0]->block;
    for (Fiber* fiber : alive) {
      if (!all && fiber->block != only) continue;
      current = fiber;
      threadIdx = dim3(fiber->thread);
      blockIdx = dim3(fiber->block);
      swapcontext(&scheduler, &fiber->context);
      if (!problem.empty()) break;
    }
    alive.erase(std::remove_if(alive.begin(), alive.end(), [](Fiber* fiber) { return fiber->done; }), alive.end());
    stuck = progress == before;
    if (stuck && all && !alive.empty() && problem.empty())
      problem = "deadlock: " + std::to_string(alive.size()) + " threads wait, the first is " +
                std::to_string(alive[0]->thread) + " of block " + std::to_string(alive[0]->block);
  }
  fibers.clear();
  blocks.clear();
  return problem.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

void __syncthreads() { meet(this_block().everybody, blockDim.x); }
void __syncwarp() { exchange({}); }
void __trap() { fail("trap"); }
int __shfl_sync(unsigned, int value, int lane) { return int(exchange({uint32_t(value)})[lane][0]); }
int __shfl_up_sync(unsigned, int value, int distance) {
  const int from = this_lane() - distance;
  return int(exchange({uint32_t(value)})[from < 0 ? this_lane() : from][0]);
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9
           : attribute == cudaDevAttrMultiProcessorCount  ? multiprocessors
                                                          : 0;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* every, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  bool valid = rank == 3 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && box[0] * 2 <= 128;
  for (int i = 0; i < 3; ++i)
    valid = valid && sizes[i] >= 1 && sizes[i] <= uint64_t(1) << 32 && box[i] >= 1 && box[i] <= 256 && every[i] == 1;
  for (int i = 0; i < 2; ++i) valid = valid && strides[i] % 16 == 0 && strides[i] < uint64_t(1) << 40;
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  map->data = static_cast<const uint8_t*>(data);
  for (int i = 0; i < 3; ++i) {
    map->sizes[i] = sizes[i];
    map->strides[i] = i ? strides[i - 1] : 2;
    map->box[i] = box[i];
  }
  return CUDA_SUCCESS;
}

namespace r1::grouped_gemm {

void barrier_init(uint32_t barrier, int arrivals) {
  at(this_block(), barrier, 8, 8);
  this_block().barriers[barrier] = {arrivals, arrivals};
}
void fence_barrier_init() {}
void barrier_expect(uint32_t address, int bytes) {
  Barrier& barrier = barrier_at(this_block(), address);
  barrier.bytes += bytes;
  --barrier.missing;
  settle(barrier);
}
void barrier_wait(uint32_t address, uint32_t parity) {
  const Barrier& barrier = barrier_at(this_block(), address);
  block_until([&] { return barrier.phase % 2 != parity; });
}
void barrier_arrive(uint32_t address, uint32_t rank) {
  require(rank < uint32_t(blocks_of_cluster), "no such block in the cluster");
  const int block = current->block / blocks_of_cluster * blocks_of_cluster + rank;
  Barrier& barrier = barrier_at(blocks[block], address);
  --barrier.missing;
  settle(barrier);
}
void barrier_arrive(uint32_t address) { barrier_arrive(address, current->block % blocks_of_cluster); }
uint32_t cluster_rank() { return current->block % blocks_of_cluster; }
void cluster_sync() { meet(clusters[current->block / blocks_of_cluster], blocks_of_cluster * blockDim.x); }
void prefetch_map(const CUtensorMap*) {}
void load_box(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int x, int y, int z) {
  load(*map, this_block(), destination, barrier, x, y, z);
}
void load_box_to(uint16_t mask, uint32_t destination, const CUtensorMap* map, uint32_t barrier, int x, int y, int z) {
  const int first = current->block / blocks_of_cluster * blocks_of_cluster;
  for (int rank = 0; rank < blocks_of_cluster; ++rank)
    if (mask >> rank & 1) load(*map, blocks[first + rank], destination, barrier, x, y, z);
}
void prefetch_to_l2(const void* address, uint32_t bytes) {
  require(reinterpret_cast<uintptr_t>(address) % 16 == 0 && bytes % 16 == 0, "misaligned prefetch");
}
void fence_async_proxy() {
  for (uint32_t chunk : current->stored) this_block().unfenced.erase(chunk);
  current->stored.clear();
}

void wgmma_fence() { current->fenced = true; }
void wgmma_commit() {
  current->pending.push_back(current->open);
  current->open.clear();
}
void wait_for_products(int pending) {
  auto& groups = current->pending;
  for (; int(groups.size()) > pending; groups.erase(groups.begin()))
    for (const Product& product : groups.front()) multiply(product);
  __syncwarp();  // the lanes of a warp wait as one
}
void multiply_later(float* d, uint64_t a, uint64_t b, bool add, bool a_k_major, bool b_k_major) {
  require(current->fenced, "products without a fence before them");
  require(a >> 62 == 1 && b >> 62 == 1, "128-byte swizzle expected");
  require((a >> 49 & 7) == 0 && (b >> 49 & 7) == 0, "no base offset expected");
  current->open.push_back({d, a, b, add, a_k_major, b_k_major});
}
void keep_in_place(float (&)[128]) { require(current->pending.empty(), "accumulators used while products run"); }

uint8_t* shared_memory() { return this_block().memory; }
uint32_t shared_address(const void* pointer) {
  const int64_t offset = static_cast<const uint8_t*>(pointer) - this_block().memory;
  require(offset >= 0 && offset < kSharedBytes, "not a shared address");
  return uint32_t(offset);
}
uint4 load_shared(uint32_t address) {
  uint4 chunk;
  std::memcpy(&chunk, at(this_block(), address, 16, 16), 16);
  return chunk;
}
void clear_shared(uint32_t address) {
  std::memset(at(this_block(), address, 16, 16), 0, 16);
  this_block().unfenced.insert(address / 16);
  current->stored.push_back(address / 16);
}
void sync_named(int threads) {
  require(current->thread < threads, "not one of the barrier's threads");
  meet(this_block().named, threads);
}
void store_matrices(uint32_t row, const uint32_t (&registers)[4]) {
  const Words* lanes = exchange({row});
  for (int i = 0; i < 4; ++i)
    std::memcpy(at(this_block(), lanes[i * 8 + this_lane() / 4][0], 16, 16) + this_lane() % 4 * 4, &registers[i], 4);
}
void load_matrices(uint32_t (&registers)[4], uint32_t row) {
  const Words* lanes = exchange({row});
  for (int i = 0; i < 4; ++i)
    std::memcpy(&registers[i], at(this_block(), lanes[i * 8 + this_lane() / 4][0], 16, 16) + this_lane() % 4 * 4, 4);
}
void load_matrices_transposed(uint32_t (&registers)[4], uint32_t row) {
  const Words* lanes = exchange({row});
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j)
      std::memcpy(&pair[j], at(this_block(), lanes[i * 8 + this_lane() % 4 * 2 + j][0], 16, 16) + this_lane() / 4 * 2,
                  2);
    std::memcpy(&registers[i], pair, 4);
  }
}
void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b_top, uint32_t b_bottom) {
  const Words* lanes = exchange({a[0], a[1], a[2], a[3], b_top, b_bottom});
  const auto element = [&](int lane, int word, int half) {
    return bfloat16_at(reinterpret_cast<const uint8_t*>(&lanes[lane][word]) + half * 2);
  };
  for (int i = 0; i < 4; ++i) {
    const int column = this_lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k)
      d[i] += element(this_lane() / 4 * 4 + k % 8 / 2, i / 2 + k / 8 * 2, k % 2) *
              element(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
  }
}

}  // namespace r1::grouped_gemm

extern "C" __attribute__((visibility("default"))) const char* model_problem() { return problem.c_str(); }
extern "C" __attribute__((visibility("default"))) void model_configure(uint32_t order) { seed = order; }
