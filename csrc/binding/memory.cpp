#include "memory.hpp"

#include <map>
#include <mutex>
#include <new>

#include "isa/huge_pages.hpp"

namespace layernorm {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr size_t kSmall = size_t{1} << 20U;  // the C library reuses what is smaller

// Working memory that calls leave to those after them: fresh memory has to be cleared by the system
// first, and for the packed weights of a few rows that would take longer than the packing. Never
// destroyed, since streams may outlive it. Nobody waits for the mutex: where another thread holds
// it, memory comes from the system, as it does in the child of a fork() that came meanwhile.
class Blocks {
 public:
  static Blocks& all() {
    static auto* const blocks = new Blocks;
    return *blocks;
  }

  // Of at least so many bytes, and of no more than twice as many.
  void* take(size_t bytes, size_t& found) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    const auto fit = kept_.lower_bound(bytes);
    if (fit == kept_.end() || fit->first / 2 > bytes) return nullptr;
    found = fit->first;
    void* const data = fit->second;
    total_ -= found;
    kept_.erase(fit);
    return data;
  }
  // False if it is not kept.
  bool give_back(void* data, size_t bytes) noexcept {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || total_ + bytes > kMost) return false;
    try {
      kept_.emplace(bytes, data);
    } catch (const std::bad_alloc&) {
      return false;
    }
    total_ += bytes;
    return true;
  }

 private:
  static constexpr size_t kMost = size_t{64} << 20U;
  std::mutex mutex_;
  std::multimap<size_t, void*> kept_;
  size_t total_ = 0;
};

}  // namespace

Scratch::Scratch(size_t bytes) : size_((bytes + 63) / 64 * 64) {
  if (size_ >= kSmall) data_ = Blocks::all().take(size_, size_);
  if (data_ != nullptr || size_ == 0) return;
  data_ = ::operator new(size_, kAlignment);
  want_huge_pages(data_, size_);
}

Scratch::~Scratch() {
  if (data_ == nullptr) return;
  if (size_ >= kSmall && Blocks::all().give_back(data_, size_)) return;
  ::operator delete(data_, kAlignment);
}

}  // namespace layernorm
