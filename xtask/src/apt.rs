//! Unpacks etcd from Debian packages: apt with directories of its own, so
//! nothing is installed and no privileges are needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};

use crate::etcd::{self, Line};
use crate::sources::{self, Source};

/// What to do where apt has no etcd.
const ADVICE: &str = "install etcd and etcdctl (3.4 or later) on the PATH, \
                      or set ETCD_BIN to a directory that holds them";

/// Unpacks the etcd and etcdctl of a release line into `home/VERSION`.
pub(crate) fn unpack(home: &Path, line: &Line) -> Result<()> {
    let sources = machine_sources().map_err(|error| anyhow!("no etcd here, and {error:#}; {ADVICE}"))?;
    let mut failures = Vec::new();
    for suite in line.suites {
        for source in &sources {
            eprintln!("xtask: unpacking etcd {} of Debian {suite} into {}", line.name, home.display());
            match unpack_from(home, line, &source.stanza(suite)) {
                Ok(()) => return Ok(()),
                Err(error) => failures.push(format!("{suite}: {error:#}")),
            }
        }
    }
    if failures.is_empty() {
        failures.push("apt's sources name no Debian archive".to_owned());
    }
    bail!("no etcd {} to be had ({}); check the network, or {ADVICE}", line.name, failures.join("; "))
}

/// The entries of the machine's apt sources that may be the Debian archive.
fn machine_sources() -> Result<Vec<Source>> {
    let config = |option: &str| -> Result<PathBuf> {
        let output = run(Command::new("apt-config").args(["shell", "value", option]))?;
        let value = output.trim().strip_prefix("value='").and_then(|value| value.strip_suffix('\''));
        Ok(value.with_context(|| format!("apt-config knows no {option}"))?.into())
    };
    let mut files = vec![config("Dir::Etc::sourcelist/f")?];
    if let Ok(entries) = config("Dir::Etc::sourceparts/d")?.read_dir() {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    files.sort();
    let mut found = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("sources") => found.extend(sources::parse_deb822(&text)),
            Some("list") => found.extend(sources::parse_list(&text)),
            _ => {}
        }
    }
    Ok(sources::archives(found))
}

/// Downloads and unpacks from one source, all in a directory of its own; only
/// the finished result is moved to its place, where a concurrent run may have
/// put the same already.
fn unpack_from(home: &Path, line: &Line, stanza: &str) -> Result<()> {
    let parent = home.join("apt");
    fs::create_dir_all(&parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let work = tempfile::tempdir_in(&parent).with_context(|| format!("cannot use {}", parent.display()))?;
    let work = work.path();
    fs::create_dir_all(work.join("cache/archives/partial"))?;
    fs::create_dir_all(work.join("lists/partial"))?;
    fs::write(work.join("debian.sources"), stanza)?;
    fs::write(work.join("apt.conf"), config(work))?;

    run(apt(work, "apt-get").args(["-qq", "update"]))?;
    let table = run(apt(work, "apt-cache").args(["madison", "etcd-server"]))?;
    let version = newest(&table, line.name).context("the suite has no package of it")?;
    let packages = ["etcd-server", "etcd-client"].map(|name| format!("{name}={version}"));
    run(apt(work, "apt-get").args(["-qq", "download"]).args(packages))?;
    for entry in work.read_dir()?.flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "deb") {
            run(Command::new("dpkg-deb").arg("-x").arg(entry.path()).arg(work.join("root")))?;
        }
    }

    let done = work.join("done");
    fs::create_dir(&done)?;
    for program in ["etcd", "etcdctl"] {
        let path = work.join("root/usr/bin").join(program);
        fs::rename(&path, done.join(program)).with_context(|| format!("the packages hold no {program}"))?;
    }
    let version = etcd::version(&done)?;
    let place = home.join(&version);
    match fs::rename(&done, &place) {
        Err(_) if place.join("etcd").is_file() && place.join("etcdctl").is_file() => Ok(()),
        moved => {
            moved.with_context(|| format!("cannot create {}; remove what is in its way", place.display()))
        }
    }
}

/// Options for an apt that keeps everything in `work` and runs no hooks.
fn config(work: &Path) -> String {
    let work = work.display();
    format!(
        "Dir::Etc::SourceList \"{work}/debian.sources\";\n\
         Dir::Etc::SourceParts \"/dev/null\";\n\
         Dir::State::Lists \"{work}/lists\";\n\
         Dir::Cache \"{work}/cache\";\n\
         Dir::Cache::Archives \"{work}/cache/archives\";\n\
         APT::Sandbox::User \"root\";\n\
         APT::Update::Error-Mode \"any\";\n\
         #clear APT::Update::Pre-Invoke;\n\
         #clear APT::Update::Post-Invoke;\n\
         #clear APT::Update::Post-Invoke-Success;\n"
    )
}

/// A program of apt that reads the options in `work` after the machine's own.
fn apt(work: &Path, program: &str) -> Command {
    let mut command = Command::new(program);
    command.current_dir(work).arg("-c").arg(work.join("apt.conf"));
    command
}

/// The first package version of a release line in what `apt-cache madison` prints.
fn newest(table: &str, line: &str) -> Option<String> {
    let mut versions = table.lines().filter_map(|row| row.split('|').nth(1)).map(str::trim);
    let upstream = |version: &str| version.split_once(':').map_or(version, |(_, rest)| rest).to_owned();
    versions.find(|version| etcd::is_of_line(&upstream(version), line)).map(str::to_owned)
}

/// Runs a command and returns what it prints; its complaint becomes the error.
fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.env("LC_ALL", "C").output().with_context(|| format!("{name} does not start"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    // The first line has the cause, later ones its consequences.
    let cause = complaint.lines().find(|line| !line.trim().is_empty());
    Err(anyhow!("{name} failed: {}", cause.unwrap_or("no reason given").trim()))
}

#[cfg(test)]
mod tests {
    use super::newest;

    #[test]
    fn the_version_of_the_line_is_picked() {
        let table = "etcd-server | 1:3.5.16-4+b2 | http://mirror.example/debian trixie/main amd64 Packages\n\
                     etcd-server | 3.4.23-4+b4 | http://mirror.example/debian bookworm/main amd64 Packages\n";
        assert_eq!(newest(table, "3.4").as_deref(), Some("3.4.23-4+b4"));
        assert_eq!(newest(table, "3.5").as_deref(), Some("1:3.5.16-4+b2"));
        assert_eq!(newest(table, "3.6"), None);
        assert_eq!(newest("", "3.4"), None);
    }
}
