// A stand-in for libcuda.so.1: runs the kernels of a launch list on the CPU, for tests alone.
//
// A "cubin" is a shared library: the kernels' CUDA text, compiled against codegen/cuda/emulation.h and standin_module.h.
// Every CUDA thread is a fiber where the kernel has barriers, shuffles, products of matrices or copies, else a call.
// Copies of cp.async are made when their thread waits for them. Memory is the host's, filled with junk, and has junk
// around it: what a kernel reads without anybody having written it, or writes outside, shows.
//
// Work of a stream is done when somebody waits for that stream, or for all of its device, and not before.
//
// While a thread captures a stream it is refused what a driver refuses: allocation, loading, copies and waiting, and
// launches that are not on the captured stream; so is every thread that waits for the whole device. What was captured is
// then invalid. Captured launches keep a copy of their arguments, as those of a driver do.
//
// Devices have contexts of their own. A stream, a graph or a kernel is used where its context is current, and a kernel
// that is given another device's memory faults. A fault is reported by every later call, those that give something back
// included, until the context is released (by anyone: tests share the process).
//
// LBLLM_STANDIN_ORDER=descending runs threads and thread blocks in the other order. LBLLM_STANDIN_VERSION is the version
// of CUDA that it says it is for, LBLLM_STANDIN_DEVICES how many devices there are, LBLLM_STANDIN_MEMORY how many bytes
// of memory each has. standin_refuse_instantiation(n) refuses one graph: that of the n-th call from now on.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <elf.h>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

#include "emulation.h"
#include "standin_module.h"

namespace {

using emulation::Index;

constexpr int kInvalidValue = 1, kOutOfMemory = 2, kInvalidImage = 200, kInvalidContext = 201, kInvalidHandle = 400, kNotFound = 500;
constexpr int kIllegalAddress = 700, kOutOfResources = 701, kLaunchFailed = 719;
constexpr int kCaptureUnsupported = 900, kCaptureInvalidated = 901, kCaptureImplicit = 906;
constexpr std::size_t kGuard = 4096, kStack = 64 << 10;
constexpr unsigned char kJunk = 0xC5;
constexpr int kWarp = 32;

struct Context;

struct Module {
  Context* context;
  void* library;
  const standin::Kernel* kernels;
  void (*shared)(char**, char**);
};

struct Function {
  const standin::Kernel* kernel;
  Module* module;
};

struct Launch {
  const Function* function;
  Index grid, block;
  std::vector<std::vector<char>> arguments;
  bool overlaps = false;  // may begin before the launch in front of it has ended
};

struct Graph {
  Context* context;
  std::vector<Launch> launches;
};

struct Stream {
  Context* context;
  std::thread::id capturing;  // the thread that captures it
  bool invalid = false;
  Graph graph;
  std::deque<std::function<int()>> waiting;
};

struct Context {
  int sticky = 0;  // an error of a kernel, which every later call reports
  Stream legacy{this};
};

struct Memory {
  std::size_t size;
  Context* context;
};

constexpr int kMostDevices = 2;
const std::thread::id kNobody;

std::recursive_mutex entered;
Context contexts[kMostDevices];
std::map<uint64_t, Memory> memory;
std::map<std::pair<void*, std::string>, Function> functions;
std::set<Stream*> streams;
std::set<Graph*> graphs;
thread_local Context* context = nullptr;
int instantiations_to_refusal = 0, retained = 0;

bool descending() {
  const char* order = std::getenv("LBLLM_STANDIN_ORDER");
  return order && std::string(order) == "descending";
}

// Fibers of one thread block.

enum class State { runnable, at_block, at_warp, returned };

// A copy to shared memory, which is made when its thread waits for it.
struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state;
  int line;
  unsigned mask;
  uint64_t value;
  int source;
  const unsigned* words;  // what it gives to a gathering of so many words; none for a shuffle
  int count;
  std::shared_ptr<std::vector<unsigned>> gathered;
  std::vector<Copy> copies;
  int groups;
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
Index grid, block, current_block;
int current = 0;
std::string failure;
const Launch* running = nullptr;

void run_thread() {
  std::vector<void*> slots;
  for (const auto& argument : running->arguments) slots.push_back(const_cast<char*>(argument.data()));
  running->function->kernel->run(slots.data());
}

void fiber_main() {
  run_thread();
  fibers[current].state = State::returned;
  swapcontext(&fibers[current].context, &scheduler);
}

bool release_warps(int threads) {
  bool released = false;
  for (int first = 0; first < threads; first += kWarp) {
    const int count = std::min(kWarp, threads - first);
    for (int lane = 0; lane < count; lane++) {
      Fiber& leader = fibers[first + lane];
      if (leader.state != State::at_warp) continue;
      bool complete = true;
      for (int other = 0; other < count; other++) {
        const Fiber& f = fibers[first + other];
        if (leader.mask >> other & 1u) complete &= f.state == State::at_warp && f.line == leader.line && f.mask == leader.mask && f.count == leader.count;
      }
      if (!complete || (leader.count && count < kWarp)) continue;
      if (leader.count) {
        auto all = std::make_shared<std::vector<unsigned>>(kWarp * leader.count);
        for (int other = 0; other < kWarp; other++) {
          Fiber& f = fibers[first + other];
          std::copy(f.words, f.words + f.count, all->begin() + other * f.count);
          f.gathered = all;
          f.state = State::runnable;
        }
        released = true;
        continue;
      }
      std::vector<uint64_t> given(count);
      for (int other = 0; other < count; other++) given[other] = fibers[first + other].value;
      const unsigned mask = leader.mask;
      for (int other = 0; other < count; other++) {
        if (!(mask >> other & 1u)) continue;
        Fiber& f = fibers[first + other];
        if (f.source < 0 || f.source >= count || !(mask >> f.source & 1u)) {
          failure = "a shuffle takes from a lane that takes no part";
          return false;
        }
        f.value = given[f.source];
        f.state = State::runnable;
      }
      released = true;
    }
  }
  return released;
}

bool release_block(int threads) {
  int line = -1;
  for (int i = 0; i < threads; i++) {
    const Fiber& f = fibers[i];
    if (f.state != State::at_block || (line >= 0 && f.line != line)) {
      failure = "a barrier that not all threads reach";
      return false;
    }
    line = f.line;
  }
  for (int i = 0; i < threads; i++) fibers[i].state = State::runnable;
  return true;
}

bool run_block(const Launch& launch) {
  const int threads = int(block.x * block.y * block.z);
  char *begin, *end;
  launch.function->module->shared(&begin, &end);
  if (begin) std::memset(begin, kJunk, end - begin);
  const bool last_first = descending();
  if (!launch.function->kernel->waits) {
    for (int i = 0; i < threads; i++) {
      current = last_first ? threads - 1 - i : i;
      run_thread();
    }
    return true;
  }
  if (int(fibers.size()) < threads) fibers.resize(threads);
  for (int i = 0; i < threads; i++) {
    Fiber& f = fibers[i];
    f.stack.resize(kStack);
    f.state = State::runnable;
    f.copies.clear();
    f.groups = 0;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = &scheduler;
    makecontext(&f.context, fiber_main, 0);
  }
  for (;;) {
    bool all_returned = true;
    for (int i = 0; i < threads; i++) {
      const int thread = last_first ? threads - 1 - i : i;
      if (fibers[thread].state == State::runnable) {
        current = thread;
        swapcontext(&scheduler, &fibers[thread].context);
      }
      all_returned &= fibers[thread].state == State::returned;
    }
    if (all_returned) return true;
    if (!release_warps(threads) && (!failure.empty() || !release_block(threads))) return false;
  }
}

bool guards_hold() {
  for (const auto& [address, m] : memory) {
    if (m.context != context) continue;
    const unsigned char* at = reinterpret_cast<const unsigned char*>(address);
    for (std::size_t i = 1; i <= kGuard; i++)
      if (at[-long(i)] != kJunk || at[m.size + i - 1] != kJunk) return false;
  }
  return true;
}

const Memory* found(uint64_t pointer) {
  auto next = memory.upper_bound(pointer);
  if (next == memory.begin()) return nullptr;
  --next;
  return pointer < next->first + next->second.size ? &next->second : nullptr;
}

int run(const Launch& launch) {
  Context* own = launch.function->module->context;
  if (own->sticky) return own->sticky;
  for (const auto& argument : launch.arguments) {
    uint64_t pointer = 0;
    if (argument.size() == sizeof pointer) std::memcpy(&pointer, argument.data(), sizeof pointer);
    const Memory* m = found(pointer);
    if (m && m->context != own) return own->sticky = kIllegalAddress;
  }
  grid = launch.grid;
  block = launch.block;
  running = &launch;
  const unsigned count = grid.x * grid.y * grid.z;
  for (unsigned i = 0; i < count; i++) {
    const unsigned at = descending() ? count - 1 - i : i;
    current_block = {at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y};
    if (!run_block(launch)) {
      std::fprintf(stderr, "stand-in driver: %s in %s\n", failure.c_str(), launch.function->kernel->name);
      failure.clear();
      return own->sticky = kLaunchFailed;
    }
  }
  return 0;
}

// A launch that overlaps the one in front of it and does not wait for that by itself begins early: here, as early as can
// be seen.
bool early(const Launch& launch) { return launch.overlaps && !launch.function->kernel->begins; }

int run_all(std::vector<const Launch*> order) {
  for (std::size_t i = 1; i < order.size(); i++)
    if (early(*order[i])) std::swap(order[i - 1], order[i]);
  for (const Launch* launch : order)
    if (int failed = run(*launch)) return failed;
  return 0;
}

void finish(Stream& stream) {
  for (; !stream.waiting.empty(); stream.waiting.pop_front())
    if (int failed = stream.waiting.front()()) stream.context->sticky = failed;
}

void finish_all(Context* of) {
  finish(of->legacy);
  for (Stream* stream : streams)
    if (stream->context == of) finish(*stream);
}

std::size_t setting(const char* name, std::size_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

std::size_t device_memory() { return setting("LBLLM_STANDIN_MEMORY", std::size_t(1) << 34); }

std::size_t taken() {
  std::size_t sum = 0;
  for (const auto& [_, m] : memory)
    if (m.context == context) sum += m.size;
  return sum;
}

// Spoils captures: those of this thread, or all that the context has.
bool spoiled(bool all_threads) {
  bool any = false;
  for (Stream* stream : streams)
    if (all_threads ? stream->capturing != kNobody && stream->context == context : stream->capturing == std::this_thread::get_id())
      any = stream->invalid = true;
  return any;
}

// What a driver does not do while any stream of this thread is being captured.
int refused() {
  if (!context) return kInvalidContext;
  return spoiled(false) ? kCaptureUnsupported : context->sticky;
}

int checked() {
  if (!context->sticky && !guards_hold()) context->sticky = kIllegalAddress;
  return context->sticky;
}

// The stream of a handle, where the current context has such a one.
Stream* stream_of(void* handle) {
  if (!handle) return &context->legacy;
  Stream* stream = static_cast<Stream*>(handle);
  return streams.count(stream) && stream->context == context ? stream : nullptr;
}

// Whether bytes belong to one allocation.
bool known(uint64_t pointer, std::size_t size) {
  const Memory* m = found(pointer);
  return m && (!size || m == found(pointer + size - 1));
}

int submit(void* handle, std::function<int()> work) {
  Stream* stream = stream_of(handle);
  if (!stream) return kInvalidHandle;
  stream->waiting.push_back(std::move(work));
  return 0;
}

int submit_copy(uint64_t to, uint64_t from, std::size_t size, void* stream) {
  return submit(stream, [=] {
    std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), size);
    return 0;
  });
}

}  // namespace

namespace emulation {

Index thread_index() {
  const unsigned i = unsigned(current);
  return {i % block.x, i / block.x % block.y, i / block.x / block.y};
}
Index block_index() { return current_block; }
Index block_shape() { return block; }
Index grid_shape() { return grid; }
int lane() { return current % kWarp; }

void block_barrier(int line) {
  fibers[current].state = State::at_block;
  fibers[current].line = line;
  swapcontext(&fibers[current].context, &scheduler);
}

uint64_t warp_exchange(int line, unsigned mask, uint64_t value, int source) {
  Fiber& f = fibers[current];
  f.state = State::at_warp;
  f.line = line;
  f.mask = mask;
  f.value = value;
  f.source = source;
  f.count = 0;
  swapcontext(&f.context, &scheduler);
  return fibers[current].value;
}

const unsigned* warp_gather(int line, const unsigned* words, int count) {
  Fiber& f = fibers[current];
  f.state = State::at_warp;
  f.line = line;
  f.mask = ~0u;
  f.words = words;
  f.count = count;
  swapcontext(&f.context, &scheduler);
  return fibers[current].gathered->data();
}

void copy_begin(int, void* to, const void* from, int bytes) {
  Fiber& f = fibers[current];
  f.copies.push_back({to, from, bytes, f.groups});
}

void copy_commit() { fibers[current].groups++; }

void copy_wait(int left) {
  Fiber& f = fibers[current];
  std::vector<Copy> under_way;
  for (const Copy& copy : f.copies) {
    if (copy.group >= f.groups - left)
      under_way.push_back(copy);
    else
      std::memcpy(copy.to, copy.from, copy.bytes);
  }
  f.copies = std::move(under_way);
}

}  // namespace emulation

#define ENTRY extern "C" int
#define ENTER const std::lock_guard<std::recursive_mutex> here(entered)

ENTRY cuInit(unsigned) {
  // The modules' kernels call what is above, wherever this library was loaded.
  Dl_info info;
  dladdr(reinterpret_cast<void*>(&checked), &info);
  return dlopen(info.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD) ? 0 : 3;
}

ENTRY cuGetErrorString(int error, const char** text) {
  switch (error) {
    case kInvalidValue: *text = "invalid argument"; break;
    case kOutOfMemory: *text = "out of memory"; break;
    case kInvalidImage: *text = "device kernel image is invalid"; break;
    case kInvalidContext: *text = "invalid device context"; break;
    case kInvalidHandle: *text = "invalid resource handle"; break;
    case kNotFound: *text = "named symbol not found"; break;
    case kIllegalAddress: *text = "an illegal memory access was encountered"; break;
    case kOutOfResources: *text = "too many resources requested for launch"; break;
    case kLaunchFailed: *text = "unspecified launch failure"; break;
    case kCaptureUnsupported: *text = "operation not permitted when stream is capturing"; break;
    case kCaptureInvalidated: *text = "operation failed due to a previous error during capture"; break;
    case kCaptureImplicit: *text = "operation would make the legacy stream depend on a capturing blocking stream"; break;
    default: return kInvalidValue;
  }
  return 0;
}

ENTRY cuDriverGetVersion(int* version) { *version = int(setting("LBLLM_STANDIN_VERSION", 13000)); return 0; }
ENTRY cuDeviceGetCount(int* n) { *n = int(setting("LBLLM_STANDIN_DEVICES", 1)); return 0; }
ENTRY cuDeviceGet(int* device, int ordinal) {
  int count;
  cuDeviceGetCount(&count);
  *device = ordinal;
  return ordinal < std::min(count, kMostDevices) ? 0 : 101;
}
ENTRY cuDeviceGetName(char* to, int size, int) { std::strncpy(to, "stand-in", size); return 0; }
ENTRY cuDeviceGetAttribute(int* value, int which, int) {
  const int arch = int(setting("LBLLM_STANDIN_ARCH", 90));
  *value = which == 75 ? arch / 10 : arch % 10;
  return 0;
}
ENTRY cuDevicePrimaryCtxRetain(void** to, int device) { ENTER; *to = &contexts[device]; retained++; return 0; }
ENTRY cuDevicePrimaryCtxRelease_v2(int device) { ENTER; contexts[device].sticky = 0; retained--; return 0; }
ENTRY cuCtxSetCurrent(void* to) { context = static_cast<Context*>(to); return 0; }

ENTRY cuCtxSynchronize() {
  ENTER;
  if (int failed = refused()) return failed;
  if (spoiled(true)) return kCaptureUnsupported;
  finish_all(context);
  return checked();
}

ENTRY cuMemAlloc_v2(uint64_t* pointer, size_t size) {
  ENTER;
  if (int failed = refused()) return failed;
  if (!size) return kInvalidValue;
  if (taken() + size > device_memory()) return kOutOfMemory;
  unsigned char* whole = static_cast<unsigned char*>(std::aligned_alloc(256, (size + 2 * kGuard + 255) / 256 * 256));
  if (!whole) return kOutOfMemory;
  std::memset(whole, kJunk, size + 2 * kGuard);
  *pointer = reinterpret_cast<uint64_t>(whole) + kGuard;
  memory[*pointer] = {size, context};
  return 0;
}

ENTRY cuMemGetInfo_v2(size_t* free, size_t* whole) {
  ENTER;
  *whole = device_memory();
  *free = *whole - std::min(*whole, taken());
  return 0;
}

ENTRY cuMemFree_v2(uint64_t pointer) {
  ENTER;
  if (spoiled(false)) return kCaptureUnsupported;
  auto m = memory.find(pointer);
  if (m == memory.end()) return kInvalidValue;
  finish_all(m->second.context);
  memory.erase(m);
  std::free(reinterpret_cast<char*>(pointer) - kGuard);
  return context->sticky;
}

ENTRY cuMemsetD8Async(uint64_t pointer, unsigned char value, size_t size, void* stream) {
  ENTER;
  if (int failed = refused()) return failed;
  if (!known(pointer, size)) return kInvalidValue;
  return submit(stream, [=] {
    std::memset(reinterpret_cast<void*>(pointer), value, size);
    return 0;
  });
}

ENTRY cuMemsetD8_v2(uint64_t pointer, unsigned char value, size_t size) {
  return cuMemsetD8Async(pointer, value, size, nullptr);
}

// Reads the host's memory at once, and writes the device's some time later.
ENTRY cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t size) {
  ENTER;
  if (int failed = refused()) return failed;
  if (!known(to, size)) return kInvalidValue;
  const char* begin = static_cast<const char*>(from);
  return submit(nullptr, [to, staged = std::vector<char>(begin, begin + size)] {
    std::memcpy(reinterpret_cast<void*>(to), staged.data(), staged.size());
    return 0;
  });
}

ENTRY cuMemcpyDtoH_v2(void* to, uint64_t from, size_t size) {
  ENTER;
  if (int failed = refused()) return failed;
  if (!known(from, size)) return kInvalidValue;
  finish(context->legacy);
  std::memcpy(to, reinterpret_cast<void*>(from), size);
  return checked();
}

// A driver captures such copies; nothing of ours does.
ENTRY cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t size, void* stream) {
  ENTER;
  if (int failed = refused()) return failed;
  return known(to, size) && known(from, size) ? submit_copy(to, from, size, stream) : kInvalidValue;
}
ENTRY cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t size, void* stream) {
  ENTER;
  if (int failed = refused()) return failed;
  return known(to, size) ? submit_copy(to, reinterpret_cast<uint64_t>(from), size, stream) : kInvalidValue;
}
ENTRY cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t size, void* stream) {
  ENTER;
  if (int failed = refused()) return failed;
  return known(from, size) ? submit_copy(reinterpret_cast<uint64_t>(to), from, size, stream) : kInvalidValue;
}

ENTRY cuModuleLoadData(void** module, const void* image) {
  ENTER;
  if (int failed = refused()) return failed;
  const auto* header = static_cast<const Elf64_Ehdr*>(image);
  if (std::memcmp(header->e_ident, ELFMAG, SELFMAG)) return kInvalidImage;
  const std::size_t size = header->e_shoff + std::size_t(header->e_shnum) * header->e_shentsize;
  // A file of its own: what has the name of a library that is loaded is taken for it.
  char path[] = "/tmp/standin-XXXXXX";
  const int file = mkstemp(path);
  const bool written = file >= 0 && write(file, image, size) == long(size);
  void* library = written ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
  if (file >= 0) {
    close(file);
    unlink(path);
  }
  if (!library) {
    std::fprintf(stderr, "stand-in driver: %s\n", written ? dlerror() : "no room for a module");
    return kInvalidImage;
  }
  auto* kernels = static_cast<const standin::Kernel*>(dlsym(library, "standin_kernels"));
  auto* shared = reinterpret_cast<void (*)(char**, char**)>(dlsym(library, "standin_shared"));
  if (!kernels || !shared) return kInvalidImage;
  *module = new Module{context, library, kernels, shared};
  return 0;
}

ENTRY cuModuleUnload(void* module) {
  ENTER;
  if (spoiled(false)) return kCaptureUnsupported;
  finish_all(static_cast<Module*>(module)->context);
  for (auto i = functions.begin(); i != functions.end();) i = i->first.first == module ? functions.erase(i) : std::next(i);
  dlclose(static_cast<Module*>(module)->library);
  delete static_cast<Module*>(module);
  return context->sticky;
}

ENTRY cuModuleGetFunction(void** function, void* module, const char* name) {
  ENTER;
  for (const standin::Kernel* k = static_cast<Module*>(module)->kernels; k->name; k++) {
    if (std::strcmp(k->name, name)) continue;
    *function = &(functions[{module, name}] = {k, static_cast<Module*>(module)});
    return 0;
  }
  return kNotFound;
}

// As in cuda.h.
struct CUlaunchAttribute {
  int id;
  char pad[8 - sizeof(int)];
  union {
    char whole[64];
    int word;
  } value;
};

struct CUlaunchConfig {
  unsigned grid[3], block[3], shared;
  void* stream;
  const CUlaunchAttribute* attributes;
  unsigned count;
};

static int launch(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                  unsigned shared, void* stream, void** arguments, bool overlaps) {
  ENTER;
  const auto* f = static_cast<const Function*>(function);
  if (!context) return kInvalidContext;
  Stream* on = stream_of(stream);
  if (!on || f->module->context != context) return kInvalidHandle;
  if (!stream && spoiled(false)) return kCaptureImplicit;
  if (!gx || !gy || !gz || !bx || !by || !bz || gy > 65535 || gz > 65535 || bz > 64) return kInvalidValue;
  if (bx * by * bz > 1024 || bx * by * bz > f->kernel->most_threads || shared) return kOutOfResources;
  Launch launch{f, {gx, gy, gz}, {bx, by, bz}, {}, overlaps};
  for (int i = 0; i < f->kernel->count; i++) {
    const char* at = static_cast<const char*>(arguments[i]);
    launch.arguments.emplace_back(at, at + f->kernel->sizes[i]);
  }
  if (on->capturing != kNobody) {
    on->graph.launches.push_back(std::move(launch));
    return 0;
  }
  if (context->sticky) return context->sticky;
  on->waiting.push_back([launch] { return run(launch); });
  // The same as in a graph, where what is in front of it has not begun either.
  const std::size_t count = on->waiting.size();
  if (early(launch) && count > 1) std::swap(on->waiting[count - 2], on->waiting[count - 1]);
  return 0;
}

ENTRY cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                     unsigned shared, void* stream, void** arguments, void**) {
  return launch(function, gx, gy, gz, bx, by, bz, shared, stream, arguments, false);
}

ENTRY cuLaunchKernelEx(const CUlaunchConfig* given, void* function, void** arguments, void**) {
  ENTER;
  bool overlaps = false;
  for (unsigned i = 0; i < given->count; i++) {
    if (given->attributes[i].id != 6) return kInvalidValue;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    overlaps = given->attributes[i].value.word;
  }
  const Stream* on = context ? stream_of(given->stream) : nullptr;
  if (overlaps && on && on->capturing != kNobody && setting("LBLLM_STANDIN_VERSION", 13000) < 12030)
    return kCaptureUnsupported;
  const unsigned *g = given->grid, *b = given->block;
  return launch(function, g[0], g[1], g[2], b[0], b[1], b[2], given->shared, given->stream, arguments, overlaps);
}

ENTRY cuStreamCreate(void** stream, unsigned) {
  ENTER;
  if (!context) return kInvalidContext;
  auto* made = new Stream{context};
  streams.insert(made);
  *stream = made;
  return context->sticky;
}

ENTRY cuStreamDestroy_v2(void* handle) {
  ENTER;
  Stream* stream = stream_of(handle);
  if (!handle || !stream) return kInvalidHandle;
  finish(*stream);
  streams.erase(stream);
  delete stream;
  return context->sticky;
}

ENTRY cuStreamSynchronize(void* handle) {
  ENTER;
  if (int failed = refused()) return failed;
  Stream* stream = stream_of(handle);
  if (!stream) return kInvalidHandle;
  if (stream->capturing != kNobody) {
    stream->invalid = true;
    return kCaptureUnsupported;
  }
  finish(*stream);
  return checked();
}

ENTRY cuStreamBeginCapture_v2(void* handle, int mode) {
  ENTER;
  Stream* stream = stream_of(handle);
  if (!handle || !stream) return kInvalidHandle;
  if (stream->capturing != kNobody || mode != 1) return kInvalidValue;
  stream->capturing = std::this_thread::get_id();
  stream->invalid = false;
  stream->graph = {context, {}};
  return context->sticky;
}

ENTRY cuStreamEndCapture(void* handle, void** graph) {
  ENTER;
  Stream* stream = stream_of(handle);
  if (!handle || !stream || stream->capturing != std::this_thread::get_id()) return kInvalidValue;
  stream->capturing = kNobody;
  *graph = nullptr;
  if (stream->invalid) return kCaptureInvalidated;
  *graph = *graphs.insert(new Graph(stream->graph)).first;
  return context->sticky;
}

ENTRY cuGraphInstantiateWithFlags(void** executable, void* handle, uint64_t) {
  ENTER;
  Graph* graph = static_cast<Graph*>(handle);
  if (!graphs.count(graph) || graph->context != context) return kInvalidValue;
  if (instantiations_to_refusal && !--instantiations_to_refusal) return kOutOfMemory;
  *executable = *graphs.insert(new Graph(*graph)).first;
  return context->sticky;
}

ENTRY cuGraphLaunch(void* executable, void* handle) {
  ENTER;
  if (int failed = refused()) return failed;
  Graph* graph = static_cast<Graph*>(executable);
  if (!graphs.count(graph) || graph->context != context) return kInvalidHandle;
  return submit(handle, [launches = graph->launches] {
    std::vector<const Launch*> order;
    for (const Launch& launch : launches) order.push_back(&launch);
    return run_all(std::move(order));
  });
}

static int destroy(void* handle) {
  ENTER;
  Graph* graph = static_cast<Graph*>(handle);
  if (!graphs.erase(graph)) return kInvalidHandle;
  delete graph;
  return context->sticky;
}

ENTRY cuGraphExecDestroy(void* executable) { return destroy(executable); }
ENTRY cuGraphDestroy(void* graph) { return destroy(graph); }

ENTRY standin_refuse_instantiation(int n) { instantiations_to_refusal = n; return 0; }
ENTRY standin_graphs() { ENTER; return int(graphs.size()); }
ENTRY standin_streams() { ENTER; return int(streams.size()); }
ENTRY standin_retained() { return retained; }

ENTRY cuEventCreate(void** event, unsigned) { *event = new char; return 0; }
ENTRY cuEventRecord(void*, void*) { return 0; }
ENTRY cuEventSynchronize(void*) { return cuCtxSynchronize(); }
ENTRY cuEventElapsedTime(float* ms, void*, void*) { *ms = 1.0f; return 0; }
ENTRY cuEventDestroy_v2(void* event) { delete static_cast<char*>(event); return 0; }
