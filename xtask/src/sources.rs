//! Reads the machine's apt sources and points them at another Debian suite.

use std::fmt::Write;

/// Fields that [`Source::stanza`] writes itself.
const OWN_FIELDS: [&str; 5] = ["types", "suites", "components", "targets", "enabled"];

/// One entry of the machine's apt sources, as the fields of a deb822 stanza.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source(Vec<(String, String)>);

impl Source {
    /// The value of a field, or the empty string.
    fn field(&self, name: &str) -> &str {
        let field = self.0.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
        field.map_or("", |(_, value)| value.as_str())
    }

    fn has(&self, name: &str, word: &str) -> bool {
        self.field(name).split_whitespace().any(|other| other == word)
    }

    /// Whether the Debian archive may be behind it: binary packages of a
    /// section `main`, in a suite that is a release and not an addition to one.
    fn is_archive(&self) -> bool {
        let is_release = |suite: &str| !suite.contains(['-', '/']);
        self.has("Types", "deb")
            && self.has("Components", "main")
            && !self.field("Enabled").eq_ignore_ascii_case("no")
            && self.field("Suites").split_whitespace().any(is_release)
    }

    /// Whether its address ends like that of a mirror of Debian.
    fn is_likely(&self) -> bool {
        self.field("URIs").split_whitespace().any(|uri| uri.trim_end_matches('/').ends_with("/debian"))
    }

    /// The same source for another suite: address, keyring and other options
    /// stay, and of its indexes apt reads only the list of packages.
    pub(crate) fn stanza(&self, suite: &str) -> String {
        let mut text = format!("Types: deb\nSuites: {suite}\nComponents: main\nTargets: Packages\n");
        for (key, value) in &self.0 {
            if !OWN_FIELDS.iter().any(|own| key.eq_ignore_ascii_case(own)) {
                // Writing to a string does not fail.
                let _ = writeln!(text, "{key}: {value}");
            }
        }
        text
    }
}

/// The sources that may be the Debian archive, the likely ones first.
pub(crate) fn archives(mut sources: Vec<Source>) -> Vec<Source> {
    sources.retain(Source::is_archive);
    sources.sort_by_key(|source| !source.is_likely());
    sources
}

/// Reads a file of the deb822 style (`*.sources`).
pub(crate) fn parse_deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            if !fields.is_empty() {
                sources.push(Source(std::mem::take(&mut fields)));
            }
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((key, value)) = line.split_once(':') {
            fields.push((key.trim().to_owned(), value.trim().to_owned()));
        }
    }
    sources
}

/// Reads a file of the one-line style (`sources.list`, `*.list`).
pub(crate) fn parse_list(text: &str) -> Vec<Source> {
    text.lines().filter_map(parse_line).collect()
}

/// Reads `deb [option=value …] address suite component…`.
fn parse_line(line: &str) -> Option<Source> {
    let line = line.split('#').next()?.trim();
    let (kind, rest) = line.split_once(char::is_whitespace)?;
    let rest = rest.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let mut fields = vec![
        ("Types".to_owned(), kind.to_owned()),
        ("URIs".to_owned(), words.next()?.to_owned()),
        ("Suites".to_owned(), words.next()?.to_owned()),
        ("Components".to_owned(), words.collect::<Vec<_>>().join(" ")),
    ];
    for option in options.split_whitespace() {
        let (key, value) = option.split_once('=')?;
        let key = match key.trim_end_matches(['+', '-']) {
            "arch" => "Architectures",
            "lang" => "Languages",
            "target" => "Targets",
            other => other,
        };
        fields.push((key.to_owned(), value.replace(',', " ")));
    }
    Some(Source(fields))
}

#[cfg(test)]
mod tests {
    use super::{archives, parse_deb822, parse_list};

    const DEB822: &str = "\
# A comment.
Types: deb deb-src
URIs: http://mirror.example/debian/
# Another.
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian.gpg
Check-Valid-Until: no

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Types: deb
URIs: http://other.example/tool
Suites: bookworm
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc

Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
Enabled: no
";

    #[test]
    fn a_stanza_keeps_its_options_and_changes_its_suite() {
        let stanza = archives(parse_deb822(DEB822))[0].stanza("trixie");
        assert_eq!(
            stanza,
            "Types: deb\nSuites: trixie\nComponents: main\nTargets: Packages\n\
             URIs: http://mirror.example/debian/\nSigned-By: /usr/share/keyrings/debian.gpg\n\
             Check-Valid-Until: no\n"
        );
    }

    #[test]
    fn a_key_of_several_lines_stays_whole() {
        let stanza = archives(parse_deb822(DEB822))[1].stanza("sid");
        assert!(
            stanza.ends_with("Signed-By: \n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n"),
            "{stanza}"
        );
    }

    #[test]
    fn only_what_may_be_the_debian_archive_is_left() {
        assert_eq!(archives(parse_deb822(DEB822)).len(), 2);
        let list = "deb-src http://mirror.example/debian bookworm main\n\
                    deb http://tool.example/debian bookworm stable\n\
                    deb http://mirror.example/debian-security bookworm-security main\n\
                    # deb http://mirror.example/debian bookworm main\n";
        assert_eq!(archives(parse_list(list)), []);
    }

    #[test]
    fn one_line_sources_read_like_stanzas_and_mirrors_come_first() {
        let list = "deb [trusted=yes] http://tool.example/apt stable main\n\
                    deb [arch=amd64,arm64 signed-by=/k.gpg] http://mirror.example/debian bookworm main # x\n";
        let stanza = archives(parse_list(list))[0].stanza("bookworm");
        assert_eq!(
            stanza,
            "Types: deb\nSuites: bookworm\nComponents: main\nTargets: Packages\n\
             URIs: http://mirror.example/debian\nArchitectures: amd64 arm64\nsigned-by: /k.gpg\n"
        );
    }
}
