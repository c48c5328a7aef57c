/* Runs generated CPU kernels in a process of its own: the little of TVM's runtime that kernels call, and a main() that
 * answers calls until its input ends.
 *
 * A call on the standard input: int64 index of the kernel, int64 count of tensors; for each tensor int64 dtype code,
 * bits, alignment, dimensions, the shape, then its bytes. The answer on the standard output: the bytes of every tensor
 * after the call.
 *
 * Kernels may be generated with calls of the functions below in place of the tile instructions of those names.
 *
 * Every tensor ends right before a page that may not be touched, and starts behind one, so an access outside is a
 * segmentation fault.
 */

#include <dlpack/dlpack.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <tvm/ffi/c_api.h>
#include <tvm/runtime/c_backend_api.h>
#include <unistd.h>

#define MOST_TENSORS 8
#define MOST_DIMENSIONS 4
#define TASKS 3 /* of a parallel launch, one after the other */
#define WORKSPACE_ALIGNMENT 64

typedef int (*Kernel)(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result);

/* Generated for each program: the kernels it is linked with. */
extern const Kernel kernels[];

typedef struct {
  DLTensor dl;
  int64_t shape[MOST_DIMENSIONS], strides[MOST_DIMENSIONS];
  size_t bytes;
  void* memory; /* with the forbidden pages around */
  size_t reserved;
} Tensor;

static void stop(const char* reason) {
  fprintf(stderr, "%s\n", reason);
  exit(2);
}

#define TILE_REGISTERS 8
#define TILE_LINES 16
#define TILE_LINE_BYTES 64

typedef struct {
  int lines, line_bytes;
  union {
    int8_t bytes[TILE_LINE_BYTES];
    int32_t words[TILE_LINE_BYTES / 4];
  } line[TILE_LINES];
} Tile;

static Tile tiles[TILE_REGISTERS];
static int tiles_configured;

static Tile* tile_of(int number) {
  if (!tiles_configured) stop("a tile is used that is not configured");
  return &tiles[number];
}

int ldtilecfg(const uint8_t* memory) {
  if (memory[0] != 1) stop("tiles are configured with an unknown palette");
  memset(tiles, 0, sizeof tiles);
  for (int i = 0; i < TILE_REGISTERS; ++i) {
    tiles[i].line_bytes = memory[16 + 2 * i] + 256 * memory[17 + 2 * i];
    tiles[i].lines = memory[48 + i];
    if (tiles[i].lines > TILE_LINES || tiles[i].line_bytes > TILE_LINE_BYTES) stop("a tile is configured too large");
  }
  return tiles_configured = 1;
}

int tilerelease(void) { return tiles_configured = 0; }

int tilezero(int number) {
  memset(tile_of(number)->line, 0, sizeof tiles->line);
  return 0;
}

int tileloadd64(int number, const char* memory, int64_t stride) {
  Tile* tile = tile_of(number);
  tilezero(number);
  for (int i = 0; i < tile->lines; ++i) memcpy(tile->line[i].bytes, memory + i * stride, (size_t)tile->line_bytes);
  return 0;
}

int tilestored64(int number, char* memory, int64_t stride) {
  const Tile* tile = tile_of(number);
  for (int i = 0; i < tile->lines; ++i) memcpy(memory + i * stride, tile->line[i].bytes, (size_t)tile->line_bytes);
  return 0;
}

int tdpbssd(int total, int first, int second) {
  Tile *c = tile_of(total), *a = tile_of(first), *b = tile_of(second);
  if (c->lines != a->lines || c->line_bytes != b->line_bytes || a->line_bytes != 4 * b->lines) {
    stop("tiles are multiplied whose shapes do not fit");
  }
  for (int m = 0; m < c->lines; ++m) {
    for (int k = 0; k < b->lines; ++k) {
      for (int n = 0; n < c->line_bytes / 4; ++n) {
        for (int j = 0; j < 4; ++j) c->line[m].words[n] += a->line[m].bytes[4 * k + j] * b->line[k].bytes[4 * n + j];
      }
    }
  }
  return 0;
}

static void* allocate_workspace(int type, int id, uint64_t bytes, int code, int bits) {
  (void)type, (void)id, (void)code, (void)bits;
  uint64_t rounded = (bytes / WORKSPACE_ALIGNMENT + 1) * WORKSPACE_ALIGNMENT;
  void* memory = aligned_alloc(WORKSPACE_ALIGNMENT, rounded);
  /* NaN in every float, so that reading what nobody wrote does not go unseen. */
  return memory ? memset(memory, 0xff, rounded) : NULL;
}

static int free_workspace(int type, int id, void* memory) {
  (void)type, (void)id;
  free(memory);
  return 0;
}

static int launch(FTVMParallelLambda task, void* data, int count) {
  TVMParallelGroupEnv environment = {NULL, count ? count : TASKS};
  for (int i = 0; i < environment.num_task; ++i) {
    tiles_configured = 0; /* every thread has its own */
    int status = task(i, &environment, data);
    if (status) return status;
  }
  return 0;
}

/* A compiled module calls the runtime through these; its own definitions are weak. */
void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate_workspace;
int (*__TVMBackendFreeWorkspace)(int, int, void*) = free_workspace;
int (*__TVMBackendParallelLaunch)(FTVMParallelLambda, void*, int) = launch;

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; ++i) fputs(parts[i] ? parts[i] : "", stderr);
  fputc('\n', stderr);
}

static void read_all(void* target, size_t bytes) {
  if (bytes && fread(target, 1, bytes, stdin) != bytes) stop("a call is incomplete");
}

static int64_t read_number(void) {
  int64_t value;
  read_all(&value, sizeof value);
  return value;
}

static size_t rounded_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

static void reserve(Tensor* tensor, size_t alignment) {
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  size_t inner = rounded_up(rounded_up(tensor->bytes, alignment), page);
  tensor->reserved = inner + 2 * page;
  tensor->memory = mmap(NULL, tensor->reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (tensor->memory == MAP_FAILED) stop("out of memory");
  char* end = (char*)tensor->memory + page + inner;
  if (mprotect(tensor->memory, page, PROT_NONE) || mprotect(end, page, PROT_NONE)) stop("pages cannot be protected");
  tensor->dl.data = end - rounded_up(tensor->bytes, alignment);
}

static void read_tensor(Tensor* tensor) {
  memset(tensor, 0, sizeof *tensor);
  DLTensor* dl = &tensor->dl;
  dl->dtype.code = (uint8_t)read_number();
  dl->dtype.bits = (uint8_t)read_number();
  dl->dtype.lanes = 1;
  dl->device = (DLDevice){kDLCPU, 0};
  size_t alignment = (size_t)read_number();
  dl->ndim = (int32_t)read_number();
  if (dl->ndim > MOST_DIMENSIONS) stop("a tensor has too many dimensions");
  for (int32_t i = 0; i < dl->ndim; ++i) tensor->shape[i] = read_number();
  int64_t elements = 1;
  for (int32_t i = dl->ndim - 1; i >= 0; --i) {
    tensor->strides[i] = elements;
    elements *= tensor->shape[i];
  }
  dl->shape = tensor->shape;
  dl->strides = tensor->strides;
  tensor->bytes = (size_t)elements * dl->dtype.bits / 8;
  reserve(tensor, alignment);
  read_all(dl->data, tensor->bytes);
}

int main(void) {
  int64_t index;
  while (fread(&index, sizeof index, 1, stdin) == 1) {
    Tensor tensors[MOST_TENSORS];
    TVMFFIAny arguments[MOST_TENSORS], result;
    memset(arguments, 0, sizeof arguments);
    memset(&result, 0, sizeof result);
    int64_t count = read_number();
    if (count > MOST_TENSORS) stop("too many tensors");
    for (int64_t i = 0; i < count; ++i) {
      read_tensor(&tensors[i]);
      arguments[i].type_index = kTVMFFIDLTensorPtr;
      arguments[i].v_ptr = &tensors[i].dl;
    }
    if (kernels[index](NULL, arguments, (int32_t)count, &result)) stop("it refused its arguments");
    if (tiles_configured) stop("it does not release its tiles");
    for (int64_t i = 0; i < count; ++i) {
      if (fwrite(tensors[i].dl.data, 1, tensors[i].bytes, stdout) != tensors[i].bytes) stop("the answer is cut off");
      munmap(tensors[i].memory, tensors[i].reserved);
    }
    fflush(stdout);
  }
  return 0;
}
