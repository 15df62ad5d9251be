/* A libcuda.so.1 of host memory, just large enough that the real cuda-bindings package runs on it.
   It shows that handles, pointers, names and times pass through the binding as engine/cuda.py expects. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500 };
#define CONTEXT ((void *)0x11)
#define STREAM ((void *)0x22)
#define GRAPH ((void *)0x33)
#define EXECUTABLE ((void *)0x44)
static long ticks = 0;

int cuInit(unsigned flags) { return OK; }
int cuDriverGetVersion(int *version) { *version = 13000; return OK; }
int cuDeviceGetCount(int *count) { *count = 1; return OK; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return OK; }
int cuDeviceGetName(char *name, int length, int device) { strcpy(name, "Stand-in"); return OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 8 : 9; return OK; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = CONTEXT; return OK; }
int cuDevicePrimaryCtxRelease_v2(int device) { return OK; }
int cuCtxSetCurrent(void *context) { return context == CONTEXT ? OK : INVALID; }
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) { *free_bytes = 1000000; *total = 2000000; return OK; }
int cuMemAlloc_v2(uint64_t *pointer, size_t size) {
  if (size > 500000) return OUT_OF_MEMORY;
  *pointer = (uint64_t)malloc(size);
  return OK;
}
int cuMemFree_v2(uint64_t pointer) { free((void *)pointer); return OK; }
int cuMemAllocHost_v2(void **pointer, size_t size) { *pointer = malloc(size); return OK; }
int cuMemFreeHost(void *pointer) { free(pointer); return OK; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *stream) {
  memcpy((void *)to, from, size);
  return stream == STREAM ? OK : INVALID;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *stream) {
  memcpy(to, (void *)from, size);
  return stream == STREAM ? OK : INVALID;
}
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t size, void *stream) {
  memset((void *)to, value, size);
  return stream == STREAM ? OK : INVALID;
}
int cuStreamCreate(void **stream, unsigned flags) { *stream = STREAM; return flags == 1 ? OK : INVALID; }
int cuStreamDestroy_v2(void *stream) { return stream == STREAM ? OK : INVALID; }
int cuStreamSynchronize(void *stream) { return stream == STREAM ? OK : INVALID; }
int cuEventCreate(void **event, unsigned flags) { *event = malloc(sizeof(long)); return OK; }
int cuEventDestroy_v2(void *event) { free(event); return OK; }
int cuEventRecord(void *event, void *stream) { *(long *)event = ticks++; return stream == STREAM ? OK : INVALID; }
int cuEventElapsedTime(float *ms, void *start, void *end) {
  *ms = 0.5f * (*(long *)end - *(long *)start);
  return OK;
}
int cuEventElapsedTime_v2(float *ms, void *start, void *end) { return cuEventElapsedTime(ms, start, end); }
int cuStreamBeginCapture_v2(void *stream, int mode) { return stream == STREAM && mode == 1 ? OK : INVALID; }
int cuStreamEndCapture(void *stream, void **graph) { *graph = GRAPH; return OK; }
int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
  *executable = EXECUTABLE;
  return graph == GRAPH ? OK : INVALID;
}
int cuGraphLaunch(void *executable, void *stream) {
  return executable == EXECUTABLE && stream == STREAM ? OK : INVALID;
}
int cuGraphExecDestroy(void *executable) { return executable == EXECUTABLE ? OK : INVALID; }
int cuGraphDestroy(void *graph) { return graph == GRAPH ? OK : INVALID; }
int cuGetErrorName(int error, const char **name) { *name = "CUDA_ERROR_STAND_IN"; return OK; }
int cuGetErrorString(int error, const char **text) { *text = "a reason"; return OK; }

/* Where the binding looks every function up; newer forms of a function have a suffix here. */
int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
  static const char *suffixes[] = {"_v2", "", "WithFlags"};
  char symbol[256];
  Dl_info self;
  dladdr((void *)cuInit, &self);
  void *library = dlopen(self.dli_fname, RTLD_NOW);
  for (int i = 0; i < 3; i++) {
    strcpy(symbol, name);
    strcat(symbol, suffixes[i]);
    *function = dlsym(library, symbol);
    if (*function != NULL) {
      if (status != NULL) *status = 0;
      return OK;
    }
  }
  if (status != NULL) *status = 1;
  return NOT_FOUND;
}
