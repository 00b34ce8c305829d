//! Which etcd the tests run: the line chosen by `cargo xtask test`, the newest one downloaded, or the PATH. With
//! `ETCD_RECIPES_EMBEDDED` set it is the embedded server, in a process of its own, and only `etcdctl` is of etcd.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The version of an etcd, in an order that compares.
pub(crate) type Version = (u32, u32, u32);

/// What the embedded server says it is.
const EMBEDDED: Version = (3, 5, 16);

/// The two programs of one etcd version.
#[derive(Debug, Clone)]
pub(crate) struct Binaries {
    /// The server.
    pub(crate) etcd: PathBuf,
    /// Whether that is the embedded one, which takes other arguments.
    pub(crate) embedded: bool,
    /// The command-line client.
    pub(crate) etcdctl: PathBuf,
    /// What the server says it is.
    pub(crate) version: Version,
}

/// The programs this test process uses. Panics with a clear sentence when there are none.
pub(crate) fn binaries() -> &'static Binaries {
    static FOUND: OnceLock<Binaries> = OnceLock::new();
    FOUND.get_or_init(|| {
        let found = of_etcd();
        if std::env::var_os("ETCD_RECIPES_EMBEDDED").is_none() {
            return found;
        }
        Binaries { etcd: example("dev_server"), embedded: true, version: EMBEDDED, ..found }
    })
}

/// The program of an example: `cargo build --examples` comes first.
pub(crate) fn example(name: &str) -> PathBuf {
    let suite = std::env::current_exe().expect("no path of this test binary");
    let path = suite.ancestors().nth(2).expect("no target folder").join("examples").join(name);
    assert!(path.is_file(), "{} is missing: run `cargo build --examples`", path.display());
    path
}

fn of_etcd() -> Binaries {
    if let Some(dir) = std::env::var_os("ETCD_RECIPES_ETCD") {
        let dir = PathBuf::from(dir);
        return in_dir(&dir).unwrap_or_else(|| {
            panic!("ETCD_RECIPES_ETCD={} holds no working etcd and etcdctl", dir.display())
        });
    }
    newest_downloaded().or_else(on_path).unwrap_or_else(|| {
        panic!(
            "the tests need a real etcd: run `cargo xtask etcd`, or set ETCD_RECIPES_ETCD to a directory \
             with etcd and etcdctl"
        )
    })
}

/// The newest version under `target/etcd/`.
fn newest_downloaded() -> Option<Binaries> {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target"), PathBuf::from);
    let entries = std::fs::read_dir(target.join("etcd")).ok()?;
    entries.flatten().filter_map(|entry| in_dir(&entry.path())).max_by_key(|found| found.version)
}

/// The first directory on the PATH that has them.
fn on_path() -> Option<Binaries> {
    std::env::split_paths(&std::env::var_os("PATH")?).find_map(|dir| in_dir(&dir))
}

fn in_dir(dir: &Path) -> Option<Binaries> {
    // The servers run in directories of their own, so the path must not depend on ours.
    let dir = dir.canonicalize().ok()?;
    let (etcd, etcdctl) = (dir.join("etcd"), dir.join("etcdctl"));
    if !etcd.is_file() || !etcdctl.is_file() {
        return None;
    }
    let output = Command::new(&etcd).arg("--version").output().ok()?;
    let version = parse_version(&String::from_utf8_lossy(&output.stdout))?;
    Some(Binaries { etcd, embedded: false, etcdctl, version })
}

/// Reads `etcd Version: 3.5.30` out of what `etcd --version` prints.
fn parse_version(text: &str) -> Option<Version> {
    let line = text.lines().find_map(|line| line.strip_prefix("etcd Version: "))?;
    let release = line.trim().split(['-', '+']).next()?;
    let mut numbers = release.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??, numbers.next()??))
}
