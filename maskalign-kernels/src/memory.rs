//! The process's memory: how the allocator treats large buffers, and how much was used.

/// Asks the allocator to keep freed memory for the next step instead of giving it back to the system.
///
/// A step allocates and frees the same large buffers again and again. GNU libc maps large ones afresh each time and
/// trims the top of its heap, so that every step waits for its pages to be cleared: 80 MiB of them for ViT-Ti at
/// batch 32, about three percent of the step. Other allocators keep freed memory; for them this does nothing.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// Buffers beyond this are still mapped one by one: kept in the heap, those of ViT-B leave gaps that cost a
        /// tenth of its memory, and its steps are too long to gain by it.
        const LARGEST_KEPT: libc::c_int = 12 << 20;
        /// Idle memory at the top of the heap that is worth a system call: what a step of ViT-Ti needs at its peak.
        const TRIM: libc::c_int = 128 << 20;
        // SAFETY: both calls set a number inside the allocator, which locks itself.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, LARGEST_KEPT);
            libc::mallopt(libc::M_TRIM_THRESHOLD, TRIM);
        }
    }
}

/// The peak resident memory of the process so far, in MiB, where the system reports it (`VmHWM` on Linux).
pub fn peak_memory_mib() -> Option<f64> {
    mib_of("/proc/self/status", "VmHWM:")
}

/// The memory available without swapping, in MiB, where the system reports it (`MemAvailable` on Linux).
pub fn available_memory_mib() -> Option<f64> {
    mib_of("/proc/meminfo", "MemAvailable:")
}

/// The number of kB in the line of a file of `/proc` that begins with `name`, in MiB.
fn mib_of(file: &str, name: &str) -> Option<f64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: f64 = line.trim().trim_end_matches(" kB").trim().parse().ok()?;
    Some(kib / 1024.0)
}
