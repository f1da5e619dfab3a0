//! How the system's allocator treats large buffers.

/// Asks the allocator to keep freed memory for the next step instead of giving it back to the system.
///
/// A step allocates and frees the same large buffers again and again. GNU libc maps large ones afresh each time and
/// trims the top of its heap, so that every step waits for its pages to be cleared: 80 MiB of them for ViT-Ti at
/// batch 32, about three percent of the step. Other allocators keep what they have; there this does nothing.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// Buffers beyond this are still mapped one by one: kept in the heap, those of ViT-B leave gaps that cost a
        /// tenth of its memory, and its steps are too long to gain by it.
        const LARGEST_KEPT: libc::c_int = 32 << 20;
        /// Idle memory at the top of the heap that is worth a system call.
        const TRIM: libc::c_int = 1 << 30;
        // SAFETY: both calls set a number inside the allocator, which locks itself.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, LARGEST_KEPT);
            libc::mallopt(libc::M_TRIM_THRESHOLD, TRIM);
        }
    }
}
