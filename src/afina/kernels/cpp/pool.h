// Threads. PyTorch's wheels bring an OpenMP library, whose idle threads spin for a while after each operation: a second
// pool would share its cores with them. So these kernels link to no OpenMP and run on PyTorch's own threads, by the one
// function of the library that compilers call (GOMP_parallel; LLVM's and Intel's OpenMP have it too). Where none is
// loaded, threads are started for each call.
#pragma once
#include "kernels.h"

// Runs task(args, begin, end) over pieces of 0..items, each of at least `grain` items, on up to `threads` threads.
void run(int threads, i64 items, i64 grain, Task task, const void* args);

// Memory of this thread, at least `bytes`, aligned to 64. A thread has kSlots such pieces; each is whoever's asked last.
enum Slot { kInput, kRows, kFactors, kSlots };
void* scratch(Slot slot, i64 bytes);

// Whose threads they are: the path of the OpenMP library, or "own".
const char* threads_of();
