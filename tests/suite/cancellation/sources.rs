//! Which methods the sources have. They are read as rustfmt leaves them.

use std::path::{Path, PathBuf};

/// Every public method that is asynchronous: an `async fn`, or one that returns a future or a stream. As
/// `Type::method`, or `file::function`.
pub(super) fn async_methods() -> Vec<String> {
    let files = files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    let texts: Vec<(String, String)> = files
        .iter()
        .map(|path| {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            (name, std::fs::read_to_string(path).expect("cannot read a source file"))
        })
        .collect();
    let streams: Vec<&str> = texts.iter().flat_map(|(_, text)| text.lines().filter_map(stream)).collect();
    texts.iter().flat_map(|(name, text)| methods(name, text, &streams)).collect()
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).expect("cannot read the sources");
    let paths = entries.map(|entry| entry.expect("cannot read the sources").path());
    paths
        .flat_map(|path| match path.is_dir() {
            true => files(&path),
            false => vec![path],
        })
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        // A tool of tests, which does nothing that could be left half done.
        .filter(|path| !path.to_string_lossy().contains("/src/embedded"))
        .collect()
}

/// The type that this line makes a stream.
fn stream(line: &str) -> Option<&str> {
    let (implemented, rest) = line.strip_prefix("impl")?.split_once(" for ")?;
    implemented.ends_with("Stream").then(|| identifier(rest))
}

fn methods(file: &str, text: &str, streams: &[&str]) -> Vec<String> {
    let mut owner = file.to_owned();
    let mut found = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.starts_with('}') {
            file.clone_into(&mut owner);
        } else if line.starts_with("impl") {
            implementor(line).clone_into(&mut owner);
        }
        let Some(rest) = line.trim_start().strip_prefix("pub ") else { continue };
        let (asynchronous, rest) = match rest.strip_prefix("async ") {
            Some(rest) => (true, rest),
            None => (false, rest),
        };
        let Some(name) = rest.strip_prefix("fn ").map(identifier) else { continue };
        let mut signature = rest.to_owned();
        while !signature.ends_with(['{', ';', '}']) {
            signature.push_str(lines.next().expect("a signature without an end"));
        }
        let returned = signature.rsplit_once("-> ").map_or("", |(_, returned)| returned);
        let returns_one = returned.contains("Future")
            || returned.contains("Stream")
            || streams.contains(&identifier(returned));
        if asynchronous || returns_one {
            found.push(format!("{owner}::{name}"));
        }
    }
    found
}

/// The type of an inherent `impl`, or of one of a trait.
fn implementor(line: &str) -> &str {
    let rest = line.strip_prefix("impl").unwrap_or_default();
    let rest = if rest.starts_with('<') { rest.split_once("> ").map_or("", |(_, rest)| rest) } else { rest };
    identifier(rest.rsplit_once(" for ").map_or(rest, |(_, implementor)| implementor).trim_start())
}

fn identifier(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    &text[..end]
}

#[test]
fn finds_what_it_should() {
    let text = "\
impl Stream for Reports {
impl<T: Clone> Thing<T> {
    pub async fn call(&self) -> Result<()> {
    pub fn wait(
        &self,
    ) -> impl Future<Output = ()> + Send {
    pub fn reports(&self) -> Reports {
    pub fn name(&self) -> &str {
    pub(crate) async fn inner(&self) {
    async fn private(&self) {
}

pub async fn open(path: &str) -> Thing<u8> {
}
";
    assert_eq!(text.lines().filter_map(stream).collect::<Vec<_>>(), ["Reports"]);
    let found = methods("thing", text, &["Reports"]);
    assert_eq!(found, ["Thing::call", "Thing::wait", "Thing::reports", "thing::open"]);
}
