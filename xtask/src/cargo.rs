//! The cargo that xtask spawns, with a protobuf compiler in its environment.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::etcd::unsupported_arch;

/// One variable for a spawned cargo.
pub(crate) type Env<'a> = (&'a str, OsString);

const MISSING: &str = "cargo does not start; is Rust installed?";

/// Spawns cargo in the workspace.
#[derive(Debug)]
pub(crate) struct Cargo {
    root: PathBuf,
    env: Vec<Env<'static>>,
}

impl Cargo {
    /// Finds the compiler for the protobuf files of etcd-client.
    pub(crate) fn new(root: &Path) -> Result<Self> {
        let mut env = protoc()?;
        env.extend(unsupported_arch().map(|(name, value)| (name, value.into())));
        Ok(Self { root: root.to_path_buf(), env })
    }

    /// Runs cargo with `env` on top of its environment and tells whether it succeeded.
    pub(crate) fn run(&self, args: &[&str], env: &[Env<'_>]) -> Result<bool> {
        println!("xtask: cargo {}", args.join(" "));
        Ok(self.command(args, env).status().context(MISSING)?.success())
    }

    /// What cargo prints.
    pub(crate) fn output(&self, args: &[&str]) -> Result<String> {
        let output = self.command(args, &[]).stderr(Stdio::null()).output().context(MISSING)?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn command(&self, args: &[&str], env: &[Env<'_>]) -> Command {
        let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(program);
        command.current_dir(&self.root).args(args);
        for (name, _) in std::env::vars_os() {
            if of_package(&name.to_string_lossy()) {
                command.env_remove(name);
            }
        }
        command.envs(self.env.iter().cloned()).envs(env.iter().cloned());
        command
    }

    /// Runs cargo and makes a failure of it an error.
    pub(crate) fn must(&self, args: &[&str], env: &[Env<'_>]) -> Result<()> {
        if !self.run(args, env)? {
            bail!("`cargo {}` failed; see its messages above", args.join(" "));
        }
        Ok(())
    }
}

/// Whether a variable describes the package xtask itself to it: passed on,
/// build scripts that watch such a variable would run again each time.
fn of_package(name: &str) -> bool {
    ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_", "CARGO_PRIMARY_"]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}

/// The variables that name a protobuf compiler: none when `PROTOC` is set or
/// the `protoc` on the PATH will do, so that a plain cargo builds the same.
fn protoc() -> Result<Vec<Env<'static>>> {
    if std::env::var_os("PROTOC").is_some() || protoc_on_path() {
        return Ok(Vec::new());
    }
    let advice = "no protobuf compiler for this machine; install protoc or set PROTOC to one";
    let program = protoc_bin_vendored::protoc_bin_path().context(advice)?;
    let include = protoc_bin_vendored::include_path().context(advice)?;
    Ok(vec![("PROTOC", program.into()), ("PROTOC_INCLUDE", include.into())])
}

/// Whether the `protoc` on the PATH can compile: it needs the well-known
/// types beside it, which some distributions put into a package of their own.
fn protoc_on_path() -> bool {
    let mut command = Command::new("protoc");
    if let Some(include) = std::env::var_os("PROTOC_INCLUDE") {
        command.arg("-I").arg(include);
    }
    command
        .args(["--descriptor_set_out=/dev/null", "google/protobuf/descriptor.proto"])
        .arg("google/protobuf/struct.proto")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::of_package;

    #[test]
    fn only_the_variables_of_the_package_are_dropped() {
        assert!(of_package("CARGO_PKG_NAME"));
        assert!(of_package("CARGO_MANIFEST_DIR"));
        assert!(!of_package("CARGO_HOME"));
        assert!(!of_package("CARGO_TARGET_DIR"));
        assert!(!of_package("CARGO_BUILD_JOBS"));
    }
}
