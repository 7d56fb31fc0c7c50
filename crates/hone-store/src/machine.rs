//! What the machine has and what this process took of it, as Linux tells.

use std::fs;

/// The limit of this process's group (version 2), and of the root group where that is the container's.
const LIMITS: [&str; 2] =
    ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];

/// Bytes of memory that this process may use: the machine's, or less where a container has a limit. `None` where it cannot be told.
pub fn memory_bytes() -> Option<u64> {
    let total = field("/proc/meminfo", "MemTotal:")?;
    let limits =
        LIMITS.iter().filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok());
    Some(limits.fold(total, u64::min))
}

/// Most bytes that this process has held at once so far. `None` where it cannot be told.
pub fn peak_bytes() -> Option<u64> {
    field("/proc/self/status", "VmHWM:")
}

/// A field of such a file, which counts KiB.
fn field(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn a_process_takes_less_than_there_is() {
        let (all, peak) = (memory_bytes().unwrap(), peak_bytes().unwrap());
        assert!(peak > 1 << 20 && all > peak, "{peak} of {all}");
    }
}
