// Memory for results, kept for the next result of the same size.
#pragma once

#include <cstddef>

namespace jfbfast {

// Uninitialised memory, aligned to a page; throws std::bad_alloc.
void* take_memory(std::size_t bytes);

// Gives back what take_memory gave for as many bytes; may be called from any thread.
void give_memory(void* memory, std::size_t bytes);

}  // namespace jfbfast
