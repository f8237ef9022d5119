// What is computed on the counted device: the CPU's kernels on the device's memory, where CUDA would run one of its own.
//
// A kernel is lent CPU tensors over the device's storages: nothing is copied, nothing is counted. What it makes anew is
// taken over as a device storage, and counted from then on. What a CUDA kernel allocates beside its results cannot be
// seen here; where CUDA's *results* differ from the CPU's, the operator is written below by hand.
#include "ledger.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/SDPBackend.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/native_group_norm.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <cstring>
#include <unordered_map>

namespace counted {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using torch::jit::Stack;

bool is_ours(const Tensor& t) { return t.defined() && t.device().type() == kDevice; }

const char* const kMixed = "Expected all tensors to be on the same device, but found at least two devices, counted:0 and cpu! (";

Tensor over(c10::Storage storage, const Tensor& like, c10::DispatchKey key) {
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  made.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
  return made;
}

// The CPU tensors that a kernel is lent for one call, and the way back.
class Loan {
 public:
  Tensor lend(const Tensor& ours) {
    auto* own = ours.storage().unsafeGetStorageImpl();
    auto found = lent_.find(own);
    if (found == lent_.end()) {
      c10::DataPtr borrowed(ours.storage().mutable_data(), c10::Device(c10::DeviceType::CPU));
      auto impl = c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), ours.storage().nbytes(), std::move(borrowed), c10::GetCPUAllocator(), true);
      found = lent_.emplace(own, c10::Storage(impl)).first;
      back_.emplace(impl.get(), ours.storage());
    }
    Tensor cpu = over(found->second, ours, c10::DispatchKey::CPU);
    if (ours.is_conj()) cpu._set_conj(true);
    if (ours.is_neg()) cpu._set_neg(true);
    return cpu;
  }

  // A tensor that the kernel writes to. It may be given another size, and then it has new memory.
  Tensor lend_for_writing(const Tensor& ours) {
    Tensor cpu = lend(ours);
    written_.emplace_back(ours, cpu, cpu.storage().data());
    return cpu;
  }

  Tensor take_back(const Tensor& cpu) {
    if (!cpu.defined() || cpu.layout() != c10::kStrided) return cpu;
    for (const auto& [ours, lent, data] : written_)
      if (lent.unsafeGetTensorImpl() == cpu.unsafeGetTensorImpl()) return ours;
    Tensor ours = over(device_storage(cpu.storage()), cpu, c10::DispatchKey::PrivateUse1);
    if (cpu.is_conj()) ours._set_conj(true);
    if (cpu.is_neg()) ours._set_neg(true);
    return ours;
  }

  // Give what was written to the size, and where that took new memory the memory, that the kernel gave it.
  void settle() {
    for (auto& [ours, lent, data] : written_) {
      auto* impl = ours.unsafeGetTensorImpl();
      if (lent.storage().data() != data) impl->set_storage_keep_dtype(adopted(lent.storage()));
      if (lent.sizes() != ours.sizes() || lent.strides() != ours.strides()) {
        impl->set_sizes_and_strides(lent.sizes(), lent.strides());
        impl->set_storage_offset(lent.storage_offset());
      }
    }
  }

 private:
  c10::Storage adopted(const c10::Storage& cpu) {
    auto impl = c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), cpu.nbytes(), adopt(cpu), allocator(), true);
    return back_.insert_or_assign(cpu.unsafeGetStorageImpl(), c10::Storage(impl)).first->second;
  }
  c10::Storage device_storage(const c10::Storage& cpu) {
    const auto found = back_.find(cpu.unsafeGetStorageImpl());
    return found != back_.end() ? found->second : adopted(cpu);
  }

  std::unordered_map<c10::StorageImpl*, c10::Storage> lent_;
  std::unordered_map<c10::StorageImpl*, c10::Storage> back_;
  std::vector<std::tuple<Tensor, Tensor, const void*>> written_;
};

// Operators that CUDA too lets take tensors of the CPU beside its own.
bool takes_both(const std::string& name) {
  for (const char* allowed : {"aten::index", "aten::_index", "aten::set_", "aten::is_set_to", "aten::tensor_split"})
    if (name.rfind(allowed, 0) == 0) return true;
  return false;
}

void on_the_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const auto& schema = op.schema();
  const auto first = stack->size() - schema.arguments().size();
  Loan loan;
  bool has_ours = false, has_theirs = false, makes_ours = false;
  const auto lend = [&](const Tensor& t, bool is_written) -> Tensor {
    if (!is_ours(t)) {
      has_theirs |= t.defined() && t.dim() > 0;
      return t;
    }
    has_ours = true;
    return is_written ? loan.lend_for_writing(t) : loan.lend(t);
  };
  for (size_t i = 0; i < schema.arguments().size(); i++) {
    auto& value = (*stack)[first + i];
    const auto* alias = schema.arguments()[i].alias_info();
    const bool is_written = alias != nullptr && alias->isWrite();
    if (value.isTensor()) {
      value = lend(value.toTensor(), is_written);
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(lend(t, is_written));
      value = std::move(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& t : value.toOptionalTensorVector())
        list.push_back(t.has_value() ? std::optional<Tensor>(lend(*t, is_written)) : std::nullopt);
      value = std::move(list);
    } else if (value.isDevice() && value.toDevice().type() == kDevice) {
      makes_ours = true;
      value = c10::Device(c10::DeviceType::CPU);
    }
  }
  TORCH_CHECK(!(has_ours && has_theirs) || takes_both(schema.name()), kMixed, schema.name(), ")");
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  loan.settle();
  if (!has_ours && !makes_ours) return;
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = loan.take_back(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(loan.take_back(t));
      value = std::move(list);
    }
  }
}

Tensor empty(
    SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<c10::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    SymIntArrayRef size, SymIntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), allocator(),
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

void copy(const Tensor& from, const Tensor& to) {
  if (to.numel() == 0) return;
  // Between host and device CUDA copies plain stretches of memory only: for anything else it first makes the device's
  // side contiguous, in the destination's dtype.
  c10::DataPtr between;
  if (is_ours(from) != is_ours(to)) {
    const bool is_plain =
        from.dtype() == to.dtype() && from.strides() == to.strides() && to.is_non_overlapping_and_dense();
    const Tensor& ours = is_ours(from) ? from : to;
    if (!is_plain && !(from.dtype() == to.dtype() && ours.is_contiguous()))
      between = allocate(static_cast<size_t>(to.numel()) * to.element_size());
  }
  Loan loan;
  Tensor target = is_ours(to) ? loan.lend(to) : to;
  target.copy_(is_ours(from) ? loan.lend(from) : from);
}

Tensor& copy_(Tensor& self, const Tensor& from, bool) {
  copy(from.expand(self.sizes()), self);
  return self;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  copy(from.expand(to.sizes()), to);
  return to;
}

const Tensor& resize_(const Tensor& self, SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto* impl = self.unsafeGetTensorImpl();
  const auto needed = static_cast<size_t>((c10::multiply_integers(sizes) + self.storage_offset()) * self.element_size());
  if (needed > self.storage().nbytes()) {
    auto fresh = allocate(needed);
    if (self.storage().nbytes() > 0) std::memcpy(fresh.get(), self.storage().data(), self.storage().nbytes());
    self.storage().set_data_ptr_noswap(std::move(fresh));
    self.storage().set_nbytes(needed);
  }
  impl->set_sizes_contiguous(sizes);
  return self;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  copy(from, to);
  return to;
}

Tensor& set_storage(Tensor& self, c10::Storage storage, SymInt offset, SymIntArrayRef size, SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size), strides = C10_AS_INTARRAYREF_SLOW(stride);
  impl->set_storage_keep_dtype(std::move(storage));
  if (strides.size() == sizes.size()) impl->set_sizes_and_strides(sizes, strides);
  else impl->set_sizes_contiguous(sizes);
  impl->set_storage_offset(offset.expect_int());
  return self;
}

Tensor& set_tensor(Tensor& self, const Tensor& from) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(from.storage());
  impl->set_sizes_and_strides(from.sizes(), from.strides());
  impl->set_storage_offset(from.storage_offset());
  return self;
}

void record_stream(Tensor&, c10::Stream) { ledger().streamed++; }

void refuse_mixed(const char* what, std::initializer_list<const Tensor*> all) {
  for (const Tensor* t : all) TORCH_CHECK(!t->defined() || is_ours(*t), kMixed, what, ")");
}

const Tensor& or_none(const std::optional<Tensor>& t) {
  static const Tensor none;
  return t.has_value() ? *t : none;
}

Tensor convolution(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, SymIntArrayRef stride,
    SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding, SymInt groups) {
  refuse_mixed("convolution", {&input, &weight, &or_none(bias)});
  Loan loan;
  std::optional<Tensor> lent;
  if (or_none(bias).defined()) lent = loan.lend(*bias);
  return loan.take_back(at::convolution(
      loan.lend(input), loan.lend(weight), lent, C10_AS_INTARRAYREF_SLOW(stride), C10_AS_INTARRAYREF_SLOW(padding),
      C10_AS_INTARRAYREF_SLOW(dilation), transposed, C10_AS_INTARRAYREF_SLOW(output_padding), groups.expect_int()));
}

// CUDA's group norm takes contiguous input; torch leaves that step out for devices like this one.
Tensor group_norm(
    const Tensor& input, int64_t groups, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    double eps, bool) {
  const Tensor plain = input.contiguous();
  const auto n = plain.size(0), c = plain.size(1);
  const auto inner = n * c == 0 ? 0 : plain.numel() / (n * c);
  return std::get<0>(at::native_group_norm(plain, weight, bias, n, c, inner, groups, eps));
}

// The memory-efficient kernel wants the rows of a mask to begin at whole eights: CUDA makes a longer copy of any other.
// (`preprocess_mask` of torch's transformers/attention.cpp.)
Tensor longer_mask(const Tensor& mask) {
  bool is_aligned = mask.stride(-1) == 1;
  for (int64_t i = 0; i + 1 < mask.dim(); i++) is_aligned &= mask.stride(i) % 8 == 0;
  if (is_aligned) return {};
  auto sizes = mask.sizes().vec();
  sizes.back() += 8 - sizes.back() % 8;
  return at::empty(sizes, mask.options());
}

// Which attention CUDA would take, from compute capability 8.0 on: flash for half precision without a mask, the
// memory-efficient kernel for what is aligned to 16 bytes, else step by step; kernels can be ruled out
// (`torch.nn.attention.sdpa_kernel`). (sdp_utils.cpp of torch 2.13.)
enum class Attention { kSteps, kFlash, kEfficient };

Attention attention(const Tensor& q, const Tensor& k, const Tensor& v, bool has_mask) {
  if (q.dim() != 4 || q.size(3) != v.size(3)) return Attention::kSteps;
  const at::Context& torch_says = at::globalContext();
  const bool is_half = q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16;
  const bool is_cudnns = torch_says.userEnabledCuDNNSDP() && is_half && q.size(3) % 8 == 0 && q.size(3) <= 256;
  const bool has_flash = torch_says.userEnabledFlashSDP() || is_cudnns;
  const bool has_efficient = torch_says.userEnabledMemEfficientSDP() || is_cudnns;
  if (has_flash && is_half && !has_mask && q.size(3) <= 256) return Attention::kFlash;
  if (q.size(1) != k.size(1)) return Attention::kSteps;  // only the flash kernel shares keys among heads
  const bool is_whole = q.size(3) * static_cast<int64_t>(q.element_size()) % 16 == 0;
  return has_efficient && is_whole ? Attention::kEfficient : Attention::kSteps;
}

int64_t choose_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double, bool,
    std::optional<double>, bool) {
  const bool is_steps = attention(q, k, v, or_none(mask).defined()) == Attention::kSteps;
  return static_cast<int64_t>(is_steps ? at::SDPBackend::math : at::SDPBackend::overrideable);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, SymInt, SymInt, Tensor, Tensor, Tensor> fused_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double, bool is_causal, bool,
    std::optional<double> scale) {
  refuse_mixed("scaled_dot_product_attention", {&q, &k, &v, &or_none(mask)});
  Loan loan;
  std::optional<Tensor> lent;
  if (or_none(mask).defined()) lent = loan.lend(*mask);
  const bool shares_keys = q.size(1) != k.size(1);
  const Tensor out = at::scaled_dot_product_attention(
      loan.lend(q), loan.lend(k), loan.lend(v), lent, 0.0, is_causal, scale, shares_keys);
  // Both kernels write [batch, queries, heads, width]. Flash keeps a log-sum-exp of every query, the other one only for
  // gradients; and flash wants widths of whole multiples of 8: others are padded before, and cut after.
  const bool is_flash = attention(q, k, v, lent.has_value()) == Attention::kFlash;
  const int64_t width = q.size(3), wide = is_flash ? (width + 7) / 8 * 8 : width;
  std::vector<Tensor> padded;
  if (wide != width)
    for (const Tensor* t : {&q, &k, &v}) padded.push_back(at::empty({t->size(0), t->size(1), t->size(2), wide}, t->options()));
  const Tensor longer = !is_flash && lent.has_value() ? longer_mask(*mask) : Tensor();
  const Tensor given =
      at::empty({q.size(0), q.size(2), q.size(1), wide}, q.options()).transpose(1, 2).narrow(3, 0, width);
  loan.lend(given).copy_(out);
  const Tensor sums = at::empty({q.size(0), q.size(1), is_flash ? q.size(2) : 0}, q.options().dtype(at::kFloat));
  // What dropout would need: two words of a generator's state and a spare one, or a seed and an offset.
  const auto words = q.options().dtype(at::kLong);
  const Tensor state = is_flash ? at::empty({2}, words) : at::empty({}, words), other = at::empty({}, words);
  return {given, sums, {}, {}, SymInt(q.size(2)), SymInt(k.size(2)), state, other, {}};
}

// A parameter's data may be exchanged between the CPU and this device, as it may between the CPU and CUDA.
bool may_exchange(const Tensor& self, const Tensor& from) {
  const auto is_plain = [](const Tensor& t) {
    return t.layout() == c10::kStrided && t.key_set().has(c10::DispatchKey::Dense) && (t.device().is_cpu() || is_ours(t));
  };
  return self.unsafeGetTensorImpl()->has_compatible_shallow_copy_type(from.key_set()) ||
      (is_plain(self) && is_plain(from));
}

}  // namespace
}  // namespace counted

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &counted::choose_attention)
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&counted::on_the_cpu>());
}

// Autocast to float32 changes nothing here: these models ask for it where they are in float32 already.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &counted::empty);
  m.impl("empty_strided", &counted::empty_strided);
  m.impl("copy_", &counted::copy_);
  m.impl("_copy_from", &counted::copy_from);
  m.impl("_copy_from_and_resize", &counted::copy_from_and_resize);
  m.impl("resize_", &counted::resize_);
  m.impl("set_.source_Storage_storage_offset", &counted::set_storage);
  m.impl("set_.source_Tensor", &counted::set_tensor);
  m.impl("record_stream", &counted::record_stream);
  m.impl("convolution_overrideable", &counted::convolution);
  m.impl("group_norm", &counted::group_norm);
  m.impl("_scaled_dot_product_fused_attention_overrideable", &counted::fused_attention);
  // One kernel on CUDA, and taken apart on a device that torch does not know.
  for (const char* name : {"native_group_norm", "native_layer_norm", "_fused_rms_norm"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&counted::on_the_cpu>());
}

#define COUNTED_MAY_EXCHANGE(key) \
  TORCH_LIBRARY_IMPL(aten, key, m) { m.impl("_has_compatible_shallow_copy_type", &counted::may_exchange); }
COUNTED_MAY_EXCHANGE(CPU)
COUNTED_MAY_EXCHANGE(PrivateUse1)
COUNTED_MAY_EXCHANGE(AutogradCPU)
COUNTED_MAY_EXCHANGE(AutogradPrivateUse1)
