// Runs one CUDA kernel on a CPU, a thread block at a time, every CUDA thread a fiber.
//
// The kernel's file is compiled with -fsanitize=thread, but linked against the hooks below instead of a sanitizer: every
// load and store of the kernel that is not a register arrives here. That makes exact what a GPU leaves undefined:
//   - an access outside every buffer, misaligned for its width, or a store to an input, is an error;
//   - two threads that touch the same byte, one of them writing, without a barrier between, are a race: an error;
//   - reading shared memory that no thread of the block wrote is an error;
//   - __syncthreads() that only a part of the block reaches, or a shuffle that not all lanes of its mask reach, is an error,
//     and so is a product of a warp's matrices that not all lanes reach; it is no barrier for memory;
//   - cp.async fills shared memory when its thread waits for it, and not before; until then whoever touches that memory,
//     and a thread that returns, is in error, and so are other threads that touch it without a barrier behind the wait.
//
// Usage: program JOB RESULT. Both are binary; emulator.py writes the one and reads the other. Errors go to stderr,
// one line, exit code 3.

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

// Behind the others, which its macros would change.
#include "emulation.h"

extern "C" char __start_cuda_shared __attribute__((weak)), __stop_cuda_shared __attribute__((weak));

namespace {

using emulation::Index;

constexpr std::size_t kStackBytes = 256 << 10;
constexpr int kWarp = 32;

enum class State { runnable, at_block_barrier, at_warp_barrier, returned };

// A copy to shared memory that is under way.
struct Copy {
  char* to;
  char* from;
  int bytes;
  int group;
};

struct Fiber {
  ucontext_t context;
  char* stack;
  State state;
  Index index;
  int line;         // of the barrier it waits at
  unsigned mask;    // lanes the warp barrier waits for
  uint64_t value;   // what it gives to the exchange, then what it got
  int source;
  const unsigned* words;  // what it gives to a gathering of so many words; none for an exchange
  int count;
  std::shared_ptr<std::vector<unsigned>> gathered;
  std::vector<Copy> copies;
  int groups;  // of copies that it has committed
};

// One access to a byte: by whom and in which interval between barriers.
struct Access {
  int64_t block = -1;
  uint32_t epoch = 0;
  uint32_t warp_epoch = 0;
  int32_t thread = -1;
};

struct Shadow {
  Access write, read, other_read;
  int32_t filler = -1;  // the thread whose copy fills it
  int line = 0;         // where that began
};

struct Buffer {
  std::string name;
  char* data;
  std::size_t size;
  bool output;
  std::vector<Shadow> shadow;
};

std::vector<Fiber> fibers;
std::vector<Buffer> buffers;
std::vector<Shadow> shared_shadow;
std::vector<uint32_t> warp_epochs;
std::vector<void*> arguments;
std::vector<int64_t> integers;
ucontext_t scheduler;
Index grid, block, current_block;
int64_t block_number = 0;
uint32_t epoch = 0;
int current = 0;
bool in_kernel = false;

std::string describe(int thread) {
  const Index& t = fibers[thread].index;
  char text[64];
  std::snprintf(text, sizeof text, "thread (%u,%u,%u)", t.x, t.y, t.z);
  return text;
}

[[noreturn]] void fail(const char* format, ...) {
  std::fprintf(stderr, "block (%u,%u,%u): ", current_block.x, current_block.y, current_block.z);
  va_list values;
  va_start(values, format);
  std::vfprintf(stderr, format, values);
  va_end(values);
  std::fputc('\n', stderr);
  std::fflush(stderr);
  std::_Exit(3);
}

void suspend() {
  in_kernel = false;
  swapcontext(&fibers[current].context, &scheduler);
  in_kernel = true;
}

void fiber_main() {
  in_kernel = true;
  emulation::call_kernel(arguments.data());
  in_kernel = false;
  if (!fibers[current].copies.empty()) fail("%s returned and did not wait for its copies", describe(current).c_str());
  fibers[current].state = State::returned;
  swapcontext(&fibers[current].context, &scheduler);
}

// Gives each lane the words of all lanes of its warp.
void gather(int first, int lanes) {
  const int count = fibers[first].count;
  if (lanes < kWarp) fail("%s multiplies matrices in a warp of %d lanes", describe(first).c_str(), lanes);
  auto all = std::make_shared<std::vector<unsigned>>(kWarp * count);
  for (int lane = 0; lane < kWarp; lane++) {
    Fiber& f = fibers[first + lane];
    std::copy(f.words, f.words + count, all->begin() + lane * count);
    f.gathered = all;
    f.state = State::runnable;
  }
}

// Releases every warp whose exchange is complete.
bool release_warps() {
  bool released = false;
  const int threads = int(fibers.size());
  for (int first = 0; first < threads; first += kWarp) {
    const int count = std::min(kWarp, threads - first);
    for (int lane = 0; lane < count; lane++) {
      Fiber& leader = fibers[first + lane];
      if (leader.state != State::at_warp_barrier) continue;
      bool complete = true;
      for (int other = 0; other < count; other++) {
        const Fiber& f = fibers[first + other];
        if (leader.mask >> other & 1u)
          complete &= f.state == State::at_warp_barrier && f.line == leader.line && f.mask == leader.mask && f.count == leader.count;
      }
      if (!complete) continue;
      if (leader.count) {
        gather(first, count);
        released = true;
        continue;
      }
      const unsigned mask = leader.mask;
      std::vector<uint64_t> given(count);
      for (int other = 0; other < count; other++) given[other] = fibers[first + other].value;
      for (int other = 0; other < count; other++) {
        if (!(mask >> other & 1u)) continue;
        Fiber& f = fibers[first + other];
        if (f.source < 0 || f.source >= count || !(mask >> f.source & 1u))
          fail("%s shuffles from lane %d, which takes no part (line %d)", describe(first + other).c_str(), f.source, f.line);
        f.value = given[f.source];
        f.state = State::runnable;
      }
      warp_epochs[first / kWarp]++;
      released = true;
    }
  }
  return released;
}

void release_block() {
  const Fiber* waiting = nullptr;
  for (const Fiber& f : fibers)
    if (f.state != State::returned) waiting = &f;
  for (std::size_t i = 0; i < fibers.size(); i++) {
    const Fiber& f = fibers[i];
    if (f.state == State::at_warp_barrier)
      fail("%s waits for its warp at line %d, which not all lanes of mask %08x reach", describe(int(i)).c_str(), f.line, f.mask);
    if (f.state == State::returned)
      fail("divergent barrier: %s returned while others wait at line %d", describe(int(i)).c_str(), waiting->line);
    if (f.line != waiting->line)
      fail("divergent barrier: %s waits at line %d, others at line %d", describe(int(i)).c_str(), f.line, waiting->line);
  }
  for (Fiber& f : fibers) f.state = State::runnable;
  epoch++;
}

void run_block(std::vector<int>& order) {
  block_number++;
  epoch++;
  std::fill(warp_epochs.begin(), warp_epochs.end(), 0);
  std::memset(&__start_cuda_shared, 0xC5, &__stop_cuda_shared - &__start_cuda_shared);
  for (std::size_t i = 0; i < fibers.size(); i++) {
    Fiber& f = fibers[i];
    f.state = State::runnable;
    f.groups = 0;
    f.index = {unsigned(i % block.x), unsigned(i / block.x % block.y), unsigned(i / block.x / block.y)};
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = &scheduler;
    makecontext(&f.context, fiber_main, 0);
  }
  for (;;) {
    bool all_returned = true;
    for (int i : order) {
      if (fibers[i].state == State::runnable) {
        current = i;
        swapcontext(&scheduler, &fibers[i].context);
      }
      all_returned &= fibers[i].state == State::returned;
    }
    if (all_returned) return;
    if (!release_warps()) release_block();
  }
}

bool conflicts(const Access& previous, bool shared) {
  if (previous.thread < 0) return false;
  if (previous.block != block_number) return !shared;
  if (previous.epoch != epoch || previous.thread == current) return false;
  const int warp = current / kWarp;
  return previous.thread / kWarp != warp || previous.warp_epoch == warp_epochs[warp];
}

void track(std::vector<Shadow>& shadow, std::size_t offset, std::size_t size, bool write, const char* where, bool shared) {
  const Access now{block_number, epoch, warp_epochs[current / kWarp], current};
  for (std::size_t i = offset; i < offset + size; i++) {
    Shadow& s = shadow[i];
    if (s.filler >= 0)
      fail("%s %s byte %zu of %s, which a copy of %s fills that was begun at line %d and not waited for",
           describe(current).c_str(), write ? "writes" : "reads", i, where, describe(s.filler).c_str(), s.line);
    if (shared && !write && s.write.block != block_number)
      fail("%s reads byte %zu of %s, which no thread wrote", describe(current).c_str(), i, where);
    for (const Access* previous : {&s.write, &s.read, &s.other_read}) {
      if ((!write && previous != &s.write) || !conflicts(*previous, shared)) continue;
      fail("race: %s %s byte %zu of %s, which %s %s with no barrier between", describe(current).c_str(),
           write ? "writes" : "reads", i, where, describe(previous->thread).c_str(), previous == &s.write ? "wrote" : "read");
    }
    if (write) {
      s.write = now;
    } else if (s.read.thread != current || s.read.epoch != epoch) {
      // Two readers are enough to meet any later writer: keep one of another warp where there is one.
      if (s.read.thread >= 0 && !(s.other_read.epoch == epoch && s.read.thread / kWarp == current / kWarp))
        s.other_read = s.read;
      s.read = now;
    }
  }
}

void access(void* pointer, std::size_t size, bool write, bool aligned) {
  if (!in_kernel) return;
  char* at = static_cast<char*>(pointer);
  const Fiber& f = fibers[current];
  if (at >= f.stack && at + size <= f.stack + kStackBytes) return;
  if (aligned && reinterpret_cast<uintptr_t>(at) % size)
    fail("%s accesses %zu bytes at a misaligned address", describe(current).c_str(), size);
  char* shared = &__start_cuda_shared;
  if (at >= shared && at + size <= &__stop_cuda_shared) {
    track(shared_shadow, at - shared, size, write, "shared memory", true);
    return;
  }
  for (Buffer& b : buffers) {
    if (at < b.data || at + size > b.data + b.size) continue;
    if (b.output)
      track(b.shadow, at - b.data, size, write, b.name.c_str(), false);
    else if (write)
      fail("%s writes to the input %s", describe(current).c_str(), b.name.c_str());
    return;
  }
  for (const Buffer& b : buffers)
    if (at >= b.data - 4096 && at < b.data + b.size + 4096)
      fail("%s %s %td bytes from the start of %s, which has %zu", describe(current).c_str(), write ? "writes" : "reads",
           at - b.data, b.name.c_str(), b.size);
  fail("%s %s outside every buffer", describe(current).c_str(), write ? "writes" : "reads");
}

struct Reader {
  std::FILE* file;
  void bytes(void* to, std::size_t size) {
    if (size && std::fread(to, 1, size, file) != size) {
      std::fputs("the job is truncated\n", stderr);
      std::_Exit(4);
    }
  }
  int64_t number() {
    int64_t value;
    bytes(&value, sizeof value);
    return value;
  }
  Index index() {
    Index value;
    value.x = unsigned(number());
    value.y = unsigned(number());
    value.z = unsigned(number());
    return value;
  }
};

}  // namespace

namespace emulation {

Index thread_index() { return fibers[current].index; }
Index block_index() { return current_block; }
Index block_shape() { return block; }
Index grid_shape() { return grid; }
int lane() { return current % kWarp; }

void block_barrier(int line) {
  fibers[current].state = State::at_block_barrier;
  fibers[current].line = line;
  suspend();
}

uint64_t warp_exchange(int line, unsigned mask, uint64_t value, int source) {
  Fiber& f = fibers[current];
  if (!(mask >> lane() & 1u)) fail("%s calls a warp operation whose mask %08x leaves it out", describe(current).c_str(), mask);
  f.state = State::at_warp_barrier;
  f.line = line;
  f.mask = mask;
  f.value = value;
  f.source = source;
  f.count = 0;
  suspend();
  return fibers[current].value;
}

const unsigned* warp_gather(int line, const unsigned* words, int count) {
  Fiber& f = fibers[current];
  f.state = State::at_warp_barrier;
  f.line = line;
  f.mask = ~0u;
  f.words = words;
  f.count = count;
  suspend();
  return fibers[current].gathered->data();
}

void copy_begin(int line, void* to, const void* from, int bytes) {
  char *target = static_cast<char*>(to), *source = const_cast<char*>(static_cast<const char*>(from));
  if (target < &__start_cuda_shared || target + bytes > &__stop_cuda_shared)
    fail("%s copies to what is not shared memory (line %d)", describe(current).c_str(), line);
  access(source, bytes, false, true);
  access(target, bytes, true, true);
  for (char* at = target; at < target + bytes; at++) {
    Shadow& s = shared_shadow[at - &__start_cuda_shared];
    s.filler = current;
    s.line = line;
  }
  Fiber& f = fibers[current];
  f.copies.push_back({target, source, bytes, f.groups});
}

void copy_commit() { fibers[current].groups++; }

void copy_wait(int left) {
  Fiber& f = fibers[current];
  std::vector<Copy> under_way;
  for (const Copy& copy : f.copies) {
    if (copy.group >= f.groups - left) {
      under_way.push_back(copy);
      continue;
    }
    for (int i = 0; i < copy.bytes; i++) shared_shadow[copy.to + i - &__start_cuda_shared].filler = -1;
    access(copy.from, copy.bytes, false, true);
    access(copy.to, copy.bytes, true, true);
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
  f.copies = std::move(under_way);
}

}  // namespace emulation

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define HOOKS(size)                                                              \
  void __tsan_read##size(void* p) { access(p, size, false, true); }              \
  void __tsan_write##size(void* p) { access(p, size, true, true); }              \
  void __tsan_unaligned_read##size(void* p) { access(p, size, false, true); }    \
  void __tsan_unaligned_write##size(void* p) { access(p, size, true, true); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
#undef HOOKS
void __tsan_read_range(void* p, unsigned long size) { access(p, size, false, false); }
void __tsan_write_range(void* p, unsigned long size) { access(p, size, true, false); }
}

// The job: grid (3 numbers), block (3), seed of the fibers' order (0: ascending, 1: descending), number of blocks and their
// coordinates (3 each), number of arguments. An argument: kind (0 input, 1 output, 2 int), length of its name, name, then
// for an int its value, for a buffer its size, number of segments, and per segment offset, size and bytes. The result: the
// outputs' bytes, one after another.
int main(int count, char** paths) {
  if (count != 3) return 4;
  Reader job{std::fopen(paths[1], "rb")};
  if (!job.file) return 4;
  grid = job.index();
  block = job.index();
  const int64_t seed = job.number();
  std::vector<Index> blocks(job.number());
  for (Index& b : blocks) b = job.index();
  const int64_t argument_count = job.number();
  integers.resize(argument_count);
  for (int64_t i = 0; i < argument_count; i++) {
    const int64_t kind = job.number();
    std::string name(job.number(), ' ');
    job.bytes(name.data(), name.size());
    if (kind == 2) {
      integers[i] = job.number();
      arguments.push_back(&integers[i]);
      continue;
    }
    const std::size_t size = job.number();
    // A page more than asked for, so that no two buffers touch; untouched pages cost nothing.
    void* data = mmap(nullptr, size + 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) return 4;
    Buffer buffer{name, static_cast<char*>(data) + 4096, size, kind == 1, {}};
    if (buffer.output) buffer.shadow.resize(size);
    for (int64_t segments = job.number(); segments > 0; segments--) {
      const std::size_t offset = job.number(), length = job.number();
      if (offset + length > size) return 4;
      job.bytes(buffer.data + offset, length);
    }
    arguments.push_back(buffer.data);
    buffers.push_back(std::move(buffer));
  }
  std::fclose(job.file);

  const int threads = int(block.x * block.y * block.z);
  fibers.resize(threads);
  for (Fiber& f : fibers) f.stack = static_cast<char*>(std::aligned_alloc(4096, kStackBytes));
  warp_epochs.assign((threads + kWarp - 1) / kWarp, 0);
  shared_shadow.resize(&__stop_cuda_shared - &__start_cuda_shared);
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (seed == 1) std::reverse(order.begin(), order.end());
  if (seed > 1) std::shuffle(order.begin(), order.end(), std::mt19937(unsigned(seed)));
  for (const Index& b : blocks) {
    current_block = b;
    run_block(order);
  }

  std::FILE* result = std::fopen(paths[2], "wb");
  if (!result) return 4;
  for (const Buffer& b : buffers)
    if (b.output && std::fwrite(b.data, 1, b.size, result) != b.size) return 4;
  return std::fclose(result) ? 4 : 0;
}
