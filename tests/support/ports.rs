//! Loopback ports that stay ours over a restart.

use std::collections::HashSet;
use std::net::TcpListener;
use std::sync::Mutex;

/// Ports are taken below the range from which systems choose the local port of outgoing connections: in that
/// range any connection could take the port of a server while it is down.
const RANGE: std::ops::Range<u16> = 10_000..30_000;

static TAKEN: Mutex<Option<HashSet<u16>>> = Mutex::new(None);

/// A port nobody listens on now, never handed out twice by this process.
pub(crate) fn free_port() -> u16 {
    let mut taken = TAKEN.lock().unwrap();
    let taken = taken.get_or_insert_default();
    for _ in 0..10_000 {
        let port = fastrand::u16(RANGE);
        if taken.contains(&port) || TcpListener::bind(("127.0.0.1", port)).is_err() {
            continue;
        }
        taken.insert(port);
        return port;
    }
    panic!("no free loopback port in {RANGE:?}");
}
