// The part of DLPack (dmlc/dlpack, version 0.8) that is needed to hand a block of CPU memory to torch.
#pragma once

#include <cstdint>

namespace jfbfast::dlpack {

struct Device {
    std::int32_t type, id;  // type 1 is the CPU
};

struct DataType {
    std::uint8_t code, bits;  // code 2 is floating point, 4 bfloat16
    std::uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    std::int32_t dimensions;
    DataType dtype;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
};

struct ManagedTensor {
    Tensor tensor;
    void* context;
    void (*deleter)(ManagedTensor*);
};

}  // namespace jfbfast::dlpack
