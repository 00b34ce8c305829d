//! What an etcd has and the embedded server has not. When the suite runs on that server, a test that needs such a thing
//! sets itself aside in its first line, and says so.

use std::io::Write as _;
use std::panic::Location;

use super::binaries::binaries;

/// What a test needs of its server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needs {
    /// Data that outlives the server's process.
    Disk,
    /// Several members.
    Cluster,
    /// Counters at `/metrics`.
    Metrics,
    /// Users, roles and passwords.
    Users,
    /// Limits and other settings that etcd takes as arguments.
    Settings,
    /// The services for locks and elections.
    Locks,
}

/// Whether the server under test lacks something. If so this test is set aside, which is printed also when it succeeds,
/// and for `cargo xtask test` to count added to the file that `ETCD_RECIPES_SET_ASIDE` names.
#[track_caller]
pub(crate) fn lacking(needed: Needs) -> bool {
    if !binaries().embedded {
        return false;
    }
    let test = Location::caller();
    let line = format!("{needed:?}\t{}:{}", test.file(), test.line());
    // What the print macros print is shown only when a test fails.
    let _ = writeln!(std::io::stderr(), "set aside on the embedded server, which lacks: {line}");
    super::add_line("ETCD_RECIPES_SET_ASIDE", &line);
    true
}

/// Fails a test that needs something and did not set itself aside.
#[track_caller]
pub(super) fn asked_for(needed: Needs) {
    assert!(!binaries().embedded, "the embedded server lacks {needed:?}: begin the test with `lacking`");
}
