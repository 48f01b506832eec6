// In place of MLX's file, which specialises by address space: without them that is one definition four times.
#pragma once
namespace metal {
template <class T> struct pointer_element {};
template <class T> struct pointer_element<T*> { typedef remove_cv_t<T> type; };
template <class T> using pointer_element_t = typename pointer_element<remove_cv_t<T>>::type;
template <class T> using remove_addrspace_t = remove_cv_t<T>;
}  // namespace metal
