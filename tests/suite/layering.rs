//! Who may use whom in `src`: the session is below the recipes, which do not know each other, and only the session
//! speaks to etcd.

use std::fs;
use std::path::{Path, PathBuf};

/// What everybody may use.
const COMMON: [&str; 3] = ["error", "name", "session"];
/// What sends or receives has one of these in its name; everything else of etcd-client is data.
const SPEAKERS: [&str; 5] = ["Client", "Keeper", "Sender", "Stream", "Watcher"];

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The files of a module: `NAME.rs` and all below `NAME/`.
fn files(module: &str) -> Vec<PathBuf> {
    let mut files = vec![source().join(format!("{module}.rs"))];
    let mut folders = vec![source().join(module)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    files
}

/// The top modules of the crate.
fn modules() -> Vec<String> {
    let names =
        fs::read_dir(source()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let modules = names.filter_map(|name| Some(name.strip_suffix(".rs")?.to_owned()));
    modules.filter(|module| module != "lib").collect()
}

/// The code of a file, without comments.
fn code(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap();
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// The first names after every `path::` in a text, also within braces.
fn used(code: &str, path: &str) -> Vec<String> {
    let word = |text: &str| -> String {
        text.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    let mut names = Vec::new();
    for (at, _) in code.match_indices(path) {
        let rest = &code[at + path.len()..];
        match rest.strip_prefix('{') {
            None => names.push(word(rest)),
            Some(list) => {
                let (mut depth, mut begin) = (0, true);
                for (at, c) in list.char_indices() {
                    if begin && !c.is_whitespace() && depth == 0 {
                        names.push(word(&list[at..]));
                        begin = false;
                    }
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' => begin = true,
                        _ => {}
                    }
                }
            }
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

#[test]
fn recipes_use_the_session_and_not_each_other() {
    let modules = modules();
    for module in &modules {
        for file in files(module) {
            for other in used(&code(&file), "crate::") {
                let foreign = modules.contains(&other) && other != *module && !COMMON.contains(&&*other);
                assert!(!foreign, "{} uses crate::{other}", file.display());
            }
        }
    }
}

#[test]
fn only_the_session_speaks_to_etcd() {
    // The embedded server is the other end.
    let others = |module: &&String| !["session", "embedded"].contains(&module.as_str());
    for module in modules().iter().filter(others) {
        for file in files(module) {
            for name in used(&code(&file), "etcd_client::") {
                let speaks = SPEAKERS.iter().any(|speaker| name.contains(speaker));
                assert!(!speaks, "{} uses etcd_client::{name}", file.display());
            }
        }
    }
}

#[test]
fn what_is_used_is_found() {
    let code = "use crate::error::Error; use crate::{name::Prefix, session::{Core, Line},\n  mutex}; crate::queue::x();";
    assert_eq!(used(code, "crate::"), ["error", "name", "session", "mutex", "queue"]);
}
