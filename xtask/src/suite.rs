//! `cargo xtask test` and `cargo xtask check`.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::TestArgs;
use crate::cargo::{Cargo, Env};
use crate::etcd::{self, Etcd};

/// How many tests run at once unless the caller says otherwise.
const THREADS: &str = "4";

/// Tells the suite to run its long version.
const FULL: &str = "ETCD_RECIPES_FULL";

/// Runs all tests and sums up what ran; `Ok(false)` when a part failed.
pub(crate) fn test(root: &Path, args: &TestArgs) -> Result<bool> {
    let etcds = etcd::all(root)?;
    let cargo = Cargo::new(root)?;
    // The suite runs the examples as programs.
    cargo.must(&["build", "--workspace", "--examples"], &[])?;

    let full = args.full || std::env::var_os(FULL).is_some();
    let extent = if full { "full" } else { "not full" };
    let mut results = Vec::new();
    for (what, part) in [("unit tests", &["--lib", "--bins"][..]), ("doc tests", &["--doc"])] {
        announce(what);
        let mut command = vec!["test", "--workspace", "--no-fail-fast"];
        command.extend(part);
        let success = cargo.run(&with_libtest(command, args), &[threads()])?;
        results.push((what.to_owned(), success));
    }
    let shortened = list(root, "shortened")?;
    for (number, etcd) in etcds.iter().enumerate() {
        let what = format!("suite ({extent}) on {etcd}");
        announce(&what);
        let mut env = vec![
            threads(),
            ("ETCD_RECIPES_ETCD", etcd.dir.clone().into()),
            ("ETCD_RECIPES_SHORTENED", shortened.clone().into()),
        ];
        if full {
            env.push((FULL, "1".into()));
        }
        let mut command =
            with_libtest(vec!["test", "--test", "suite", "--test", "embedded", "--no-fail-fast"], args);
        if number > 0 {
            // It has no etcd beside it: once is enough.
            command.extend(if args.libtest.is_empty() { &["--"][..] } else { &[] });
            command.extend(["--skip", "simulation::"]);
        }
        let success = cargo.run(&command, &env)?;
        results.push((what, success));
    }
    if let Some(etcd) = etcds.last() {
        results.push(on_embedded(&cargo, root, etcd, args)?);
    }

    println!("\nxtask: what ran");
    for (what, success) in &results {
        println!("  {:6}  {what}", if *success { "ok" } else { "FAILED" });
    }
    let shortened = std::fs::read_to_string(shortened)?;
    let shortened: BTreeSet<_> = shortened.lines().filter_map(|line| line.split_once('\t')).collect();
    if !shortened.is_empty() {
        println!("\nxtask: what had fewer rounds than with --full");
        for (place, rounds) in shortened {
            println!("  {rounds:24}  {place}");
        }
    }
    Ok(results.iter().all(|(_, success)| *success))
}

/// An empty file under `target` for tests to add lines to.
fn list(root: &Path, name: &str) -> Result<PathBuf> {
    let list = root.join("target").join(name);
    std::fs::write(&list, "").with_context(|| format!("cannot write {}", list.display()))?;
    Ok(list)
}

/// Runs the suite on the embedded server, with the `etcdctl` of an etcd. Tells how much of it was set aside, and for what.
fn on_embedded(cargo: &Cargo, root: &Path, etcd: &Etcd, args: &TestArgs) -> Result<(String, bool)> {
    announce("suite on the embedded server");
    let aside = list(root, "set-aside")?;
    let suite = || with_libtest(vec!["test", "--test", "suite", "--no-fail-fast"], args);
    let env = [
        threads(),
        ("ETCD_RECIPES_EMBEDDED", "1".into()),
        ("ETCD_RECIPES_ETCD", etcd.dir.clone().into()),
        ("ETCD_RECIPES_SET_ASIDE", aside.clone().into()),
    ];
    let success = cargo.run(&suite(), &env)?;

    let mut names = suite();
    names.extend(if args.libtest.is_empty() { &["--", "--list"][..] } else { &["--list"] });
    let all = cargo.output(&names)?.lines().filter(|line| line.ends_with(": test")).count();
    let mut lacking = BTreeMap::new();
    for line in std::fs::read_to_string(&aside)?.lines() {
        let (what, _) = line.split_once('\t').context("no list of tests set aside")?;
        *lacking.entry(what.to_lowercase()).or_insert(0) += 1;
    }
    let count: usize = lacking.values().sum();
    let reasons: Vec<_> = lacking.iter().map(|(what, count)| format!("{what} {count}")).collect();
    let reasons = if reasons.is_empty() { String::new() } else { format!(": {}", reasons.join(", ")) };
    Ok((format!("suite on the embedded server, {count} of {all} tests set aside{reasons}"), success))
}

/// Checks formatting, lints and documentation, then runs all tests.
pub(crate) fn check(root: &Path, args: &TestArgs) -> Result<bool> {
    let cargo = Cargo::new(root)?;
    cargo.must(&["fmt", "--all", "--check"], &[])?;
    cargo.must(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], &[])?;
    // What a user builds who asks for nothing.
    cargo.must(&["clippy", "--lib", "--", "-D", "warnings"], &[])?;
    for feature in ["embedded", "tls", "tls-aws-lc", "tonic"] {
        cargo.must(&["clippy", "--lib", "--features", feature, "--", "-D", "warnings"], &[])?;
    }
    // As on docs.rs.
    let docs = ["doc", "--workspace", "--no-deps", "--features", "embedded,tls,tonic"];
    cargo.must(&docs, &[("RUSTDOCFLAGS", "-Dwarnings".into())])?;
    test(root, args)
}

fn announce(what: &str) {
    println!("\nxtask: {what}");
}

/// Adds what the caller has for libtest.
fn with_libtest<'a>(mut command: Vec<&'a str>, args: &'a TestArgs) -> Vec<&'a str> {
    if !args.libtest.is_empty() {
        command.push("--");
        command.extend(args.libtest.iter().map(String::as_str));
    }
    command
}

/// A limit that an argument to libtest still overrides.
fn threads() -> Env<'static> {
    let set = std::env::var_os("RUST_TEST_THREADS");
    ("RUST_TEST_THREADS", set.unwrap_or_else(|| OsString::from(THREADS)))
}
