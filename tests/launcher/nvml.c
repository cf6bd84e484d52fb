/* A stand-in for the NVIDIA driver's library: it lists the GPUs of a file named in STAND_IN_GPUS, one a line:
   name;uuid;bytes;major;minor, and after a GPU its instances, each with a "+" before its name. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char name[96], uuid[96]; unsigned long long bytes; int major, minor, parent; } device;
static device devices[64];
static int count;

int nvmlInitWithFlags(unsigned flags) {
  (void)flags;
  FILE *file = fopen(getenv("STAND_IN_GPUS") ? getenv("STAND_IN_GPUS") : "", "r");
  char line[512];
  int whole = -1;
  count = 0;
  if (!file) return 9; /* NVML_ERROR_DRIVER_NOT_LOADED */
  while (fgets(line, sizeof line, file)) {
    device *d = &devices[count];
    char *name = line[0] == '+' ? line + 1 : line;
    if (sscanf(name, "%95[^;];%95[^;];%llu;%d;%d", d->name, d->uuid, &d->bytes, &d->major, &d->minor) != 5) continue;
    if (line[0] == '+') d->parent = whole; else { d->parent = -1; whole = count; }
    count++;
  }
  fclose(file);
  return 0;
}
int nvmlShutdown(void) { return 0; }
static int nth(int parent, unsigned n, void **handle) {
  for (int i = 0; i < count; i++)
    if (devices[i].parent == parent && n-- == 0) { *handle = &devices[i]; return 0; }
  return 6; /* NVML_ERROR_NOT_FOUND */
}
static unsigned children(int parent) {
  unsigned found = 0;
  for (int i = 0; i < count; i++) found += devices[i].parent == parent;
  return found;
}
static int index_of(void *handle) { return (device *)handle - devices; }
int nvmlDeviceGetCount_v2(unsigned *number) { *number = children(-1); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned n, void **handle) { return nth(-1, n, handle); }
int nvmlDeviceGetName(void *d, char *text, unsigned size) { snprintf(text, size, "%s", ((device *)d)->name); return 0; }
int nvmlDeviceGetUUID(void *d, char *text, unsigned size) { snprintf(text, size, "%s", ((device *)d)->uuid); return 0; }
int nvmlDeviceGetMemoryInfo(void *d, unsigned long long *memory) {
  memory[0] = memory[1] = ((device *)d)->bytes;
  memory[2] = 0;
  return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *d, int *major, int *minor) {
  *major = ((device *)d)->major;
  *minor = ((device *)d)->minor;
  return 0;
}
int nvmlDeviceGetMaxMigDeviceCount(void *d, unsigned *number) { (void)d; *number = 7; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(void *d, unsigned n, void **handle) { return nth(index_of(d), n, handle); }
/* What Ray's binding, an older one, looks up besides. */
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlDeviceGetCount(unsigned *number) { return nvmlDeviceGetCount_v2(number); }
