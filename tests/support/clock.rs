//! A clock that processes share.

use std::time::Duration;

/// The time since the machine was started, its sleep included: the same clock in every process.
#[cfg(target_os = "linux")]
pub(crate) fn boottime() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).expect("a clock before its start");
    Duration::from_secs(seconds) + Duration::from_nanos(u64::try_from(time.tv_nsec).expect("not nanoseconds"))
}

/// Elsewhere the time of day has to do.
#[cfg(not(target_os = "linux"))]
pub(crate) fn boottime() -> Duration {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.expect("a time of day before 1970")
}
