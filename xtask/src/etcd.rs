//! Which etcd to run: one the machine brings, or those unpacked under `target/etcd`.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt;

/// A release line of etcd and where its packages are.
#[derive(Debug)]
pub(crate) struct Line {
    /// The first two numbers of its versions.
    pub(crate) name: &'static str,
    /// The Debian suites to look in, in this order.
    pub(crate) suites: &'static [&'static str],
}

/// The release lines the project is tested against, the newest last.
pub(crate) const LINES: [Line; 2] =
    [Line { name: "3.4", suites: &["bookworm"] }, Line { name: "3.5", suites: &["trixie", "sid"] }];

/// A directory that holds `etcd` and `etcdctl`.
#[derive(Debug)]
pub(crate) struct Etcd {
    /// The directory, absolute.
    pub(crate) dir: PathBuf,
    /// What `etcd --version` says.
    pub(crate) version: String,
    /// Where it is from, in words.
    origin: &'static str,
}

impl fmt::Display for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "etcd {} {}: {}", self.version, self.origin, self.dir.display())
    }
}

impl Etcd {
    /// Looks at a directory; `None` unless it holds both programs.
    fn look(dir: &Path, origin: &'static str) -> Result<Option<Self>> {
        if !dir.join("etcd").is_file() || !dir.join("etcdctl").is_file() {
            return Ok(None);
        }
        let dir = dir.canonicalize().with_context(|| format!("cannot read {}", dir.display()))?;
        let version = version(&dir)?;
        Ok(Some(Self { dir, version, origin }))
    }
}

/// One etcd per release line, or just the one the machine brings.
pub(crate) fn all(root: &Path) -> Result<Vec<Etcd>> {
    match of_machine()? {
        Some(etcd) => Ok(vec![etcd]),
        None => LINES.iter().map(|line| unpacked(root, line)).collect(),
    }
}

/// The etcd the machine brings, or one of the release line asked for.
pub(crate) fn one(root: &Path, name: Option<&str>) -> Result<Etcd> {
    if let Some(etcd) = of_machine()? {
        if name.is_some_and(|name| !is_of_line(&etcd.version, name)) {
            bail!("{etcd} is of another line; take it off the PATH or out of ETCD_BIN, or leave out --line");
        }
        return Ok(etcd);
    }
    let line = LINES.iter().rev().find(|line| name.is_none_or(|name| name == line.name));
    unpacked(root, line.context("no such release line of etcd")?)
}

/// The etcd named by `ETCD_BIN` or found on the PATH.
fn of_machine() -> Result<Option<Etcd>> {
    if let Some(dir) = std::env::var_os("ETCD_BIN") {
        let etcd = Etcd::look(dir.as_ref(), "from ETCD_BIN, used as it is")?;
        let etcd = etcd.context("the directory in ETCD_BIN must hold both etcd and etcdctl")?;
        return Ok(Some(etcd));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    for dir in std::env::split_paths(&path) {
        if let Some(etcd) = Etcd::look(&dir, "from the PATH, used as it is")? {
            return Ok(Some(etcd));
        }
    }
    Ok(None)
}

/// The etcd of a release line under `target/etcd`, unpacked if it is not there yet.
fn unpacked(root: &Path, line: &Line) -> Result<Etcd> {
    let home = root.join("target").join("etcd");
    if let Some(etcd) = find(&home, line)? {
        return Ok(etcd);
    }
    apt::unpack(&home, line)?;
    find(&home, line)?.with_context(|| format!("etcd {} vanished from {}", line.name, home.display()))
}

/// The newest etcd of a release line that is already under `home`.
fn find(home: &Path, line: &Line) -> Result<Option<Etcd>> {
    let Ok(entries) = home.read_dir() else { return Ok(None) };
    let mut dirs: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    dirs.retain(|dir| dir.file_name().is_some_and(|name| is_of_line(&name.to_string_lossy(), line.name)));
    // 3.5.16 comes after 3.5.9.
    dirs.sort_by_key(|dir| numbers(&dir.to_string_lossy()));
    for dir in dirs.iter().rev() {
        if let Some(etcd) = Etcd::look(dir, "under target/etcd")? {
            return Ok(Some(etcd));
        }
    }
    Ok(None)
}

/// The numbers in a name, in order.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

/// Whether a version belongs to the release line.
pub(crate) fn is_of_line(version: &str, line: &str) -> bool {
    version.strip_prefix(line).is_some_and(|rest| rest.starts_with('.'))
}

/// Asks the `etcd` in a directory for its version.
pub(crate) fn version(dir: &Path) -> Result<String> {
    let output = command(dir, "etcd").arg("--version").output();
    let output = output.with_context(|| format!("{} does not run", dir.join("etcd").display()))?;
    parse_version(&String::from_utf8_lossy(&output.stdout)).with_context(|| {
        format!("{} --version names no version; replace that etcd", dir.join("etcd").display())
    })
}

/// A program of a directory, in an environment in which none of the caller's
/// `ETCD_…` variables stands for one of its flags.
pub(crate) fn command(dir: &Path, program: &str) -> Command {
    let mut command = Command::new(dir.join(program));
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"ETCD") {
            command.env_remove(name);
        }
    }
    command.env("ETCDCTL_API", "3").envs(unsupported_arch());
    command
}

/// Without this, etcd 3.4 refuses to run on 64-bit Arm.
pub(crate) fn unsupported_arch() -> Option<(&'static str, &'static OsStr)> {
    cfg!(target_arch = "aarch64").then(|| ("ETCD_UNSUPPORTED_ARCH", OsStr::new("arm64")))
}

/// The version in what `etcd --version` prints.
fn parse_version(output: &str) -> Option<String> {
    output.lines().find_map(|line| line.strip_prefix("etcd Version: ")).map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::{is_of_line, numbers, parse_version};

    #[test]
    fn the_version_is_read_from_what_etcd_prints() {
        let output = "etcd Version: 3.4.23\nGit SHA: Not provided\nGo Version: go1.19.8\n";
        assert_eq!(parse_version(output).as_deref(), Some("3.4.23"));
        assert_eq!(parse_version("something else\n"), None);
    }

    #[test]
    fn a_line_is_not_a_mere_prefix() {
        assert!(is_of_line("3.4.23", "3.4"));
        assert!(is_of_line("3.5.16+dfsg-3", "3.5"));
        assert!(!is_of_line("3.40.1", "3.4"));
        assert!(!is_of_line("3.4", "3.4"));
    }

    #[test]
    fn the_newest_of_a_line_is_found_by_its_numbers() {
        assert!(numbers("3.5.16") > numbers("3.5.9") && numbers("3.5.16+dfsg-3") > numbers("3.5.16"));
    }
}
