// A second device for tests, on machines that have none: PyTorch's PrivateUse1 backend, whose memory is the processor's and
// whose operators are the processor's, too, but that refuses tensors of two devices in one call, and the processor's
// generators, as GPUs do.
#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/view_native.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <cstring>

namespace {

constexpr auto KIND = c10::DeviceType::PrivateUse1;

struct Memory final : at::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {data, data, &free, c10::Device(KIND, 0)};
  }
  static void free(void* data) { if (data) c10::free_cpu(data); }
  at::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(KIND, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return {KIND, 0}; }
  c10::Device getDevice() const override { return {KIND, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, {KIND, 0}); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, {KIND, 0}); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, {KIND, 0}); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  at::Allocator* getPinnedMemoryAllocator() const override { return at::getCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* impl = storage.unsafeGetStorageImpl();
    auto data = memory.allocate(bytes);
    std::memcpy(data.get(), impl->data(), std::min(bytes, impl->nbytes()));
    impl->set_data_ptr_noswap(std::move(data));
    impl->set_nbytes(bytes);
  }
};

// The same memory, as a tensor of the processor.
at::Tensor here(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != KIND) return tensor;
  auto* data = const_cast<void*>(tensor.storage().data());
  auto size = tensor.storage().nbytes() / tensor.dtype().itemsize();
  auto all = at::from_blob(data, {static_cast<int64_t>(size)}, tensor.options().device(c10::kCPU));
  return all.as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
}

const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}
at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}
at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) { here(to).copy_(here(self)); return to; }
at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (to.sizes() != self.sizes()) const_cast<at::Tensor&>(to).resize_(self.sizes());
  here(to).copy_(here(self)); return to;
}
at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  return at::cpu::as_strided_symint(self, size, stride, offset);
}
at::Tensor& set_source(at::Tensor& self, c10::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                       c10::SymIntArrayRef stride) {
  return at::cpu::set__symint(self, source, offset, size, stride);
}
at::Tensor& set_whole(at::Tensor& self, at::Storage source) {
  int64_t size = source.nbytes() / self.dtype().itemsize();
  return at::cpu::set__symint(self, source, 0, c10::SymIntArrayRef({c10::SymInt(size)}), c10::SymIntArrayRef({c10::SymInt(1)}));
}
at::Tensor view(const at::Tensor& self, c10::IntArrayRef size) { return at::native::view(self, size); }
at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::cpu::as_strided_symint(self, size, stride, std::nullopt);
}
at::Scalar local_scalar(const at::Tensor& self) { return here(self).item(); }
const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<c10::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  int64_t numel = 1; std::vector<int64_t> sizes;
  for (auto s : size) { sizes.push_back(s.expect_int()); numel *= sizes.back(); }
  size_t bytes = (numel + self.storage_offset()) * self.dtype().itemsize();
  if (self.storage().nbytes() < bytes) Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  impl->set_sizes_contiguous(sizes);
  return self;
}

// Refuses tensors of two devices. Numbers of no dimension may be the processor's, as they may on a GPU.
class Places {
 public:
  void look(const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    any_is_there_ |= tensor.device().type() == KIND;
    if (tensor.dim() > 0) (tensor.device().type() == KIND ? is_there_ : is_here_) = true;
  }
  void check(const std::string& name) const {
    TORCH_CHECK(!(is_here_ && is_there_), "Expected all tensors to be on the same device, but found at least two devices, ",
                "second:0 and cpu! (", name, ")");
  }
  void check(const at::Generator& generator, const std::string& name) const {
    TORCH_CHECK(!any_is_there_ || generator.device().type() == KIND,
                "Expected a 'second' device type for generator but found 'cpu' (", name, ")");
  }

 private:
  bool is_here_ = false, is_there_ = false, any_is_there_ = false;
};

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed,
                       c10::IntArrayRef extra, int64_t groups) {
  Places places;
  places.look(x);
  places.look(weight);
  if (bias) places.look(*bias);
  places.check("aten::convolution");
  auto bias_here = bias ? std::optional<at::Tensor>(here(*bias)) : std::nullopt;
  auto y = at::convolution(here(x), here(weight), bias_here, stride, padding, dilation, transposed, extra, groups);
  return y.to(x.device());
}
std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& above, const at::Tensor& x, const at::Tensor& weight, c10::IntArrayRef stride, c10::IntArrayRef padding,
    c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef extra, int64_t groups, std::array<bool, 3> wanted) {
  at::OptionalIntArrayRef bias({weight.size(transposed ? 1 : 0)});
  auto gradients = at::convolution_backward(here(above), here(x), here(weight), bias, stride, padding, dilation, transposed,
                                            extra, groups, wanted);
  auto there = [&](const at::Tensor& tensor) { return tensor.defined() ? tensor.to(x.device()) : tensor; };
  return {there(std::get<0>(gradients)), there(std::get<1>(gradients)), there(std::get<2>(gradients))};
}

// All other operators are the processor's. Indices of elements may be the processor's, as they may on a GPU.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  const bool takes_indices =
      name == "aten::index" || name == "aten::index_put" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
  Places places;
  for (const auto& value : torch::jit::last(stack, op.schema().arguments().size())) {
    if (value.isTensor()) places.look(value.toTensor());
    if (takes_indices) continue;
    if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) places.look(tensor);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) if (tensor) places.look(*tensor);
    }
  }
  places.check(name);
  for (const auto& value : torch::jit::last(stack, op.schema().arguments().size())) {
    if (value.isGenerator()) places.check(value.toGenerator(), name);
  }
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }  // computes as it is
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("as_strided", &as_strided);
  m.impl("set_.source_Storage_storage_offset", &set_source);
  m.impl("set_.source_Storage", &set_whole);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("resize_", &resize);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}
}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("start", [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); }); }
