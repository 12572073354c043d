//! The committed C header says what `src/abi.rs` says.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{env, fs, path::Path};

use cbindgen::{Builder, Config, DocumentationStyle, Language, Style};

const UPDATE: &str = "UPDATE_ABI_HEADER";

const HEAD: &str = "\
/* SPDX-License-Identifier: GPL-2.0-only OR BSD-3-Clause */
/*
 * Wire format of the virtio-hmm device: configuration space, requests and
 * responses. Generated from device/src/abi.rs, do not edit.
 */";

fn generate(crate_dir: &Path) -> String {
    let mut config = Config {
        language: Language::C,
        style: Style::Tag,
        documentation_style: DocumentationStyle::Doxy,
        header: Some(HEAD.into()),
        include_guard: Some("_VIRTIO_HMM_ABI_H".into()),
        sys_includes: vec!["linux/types.h".into()],
        no_includes: true,
        tab_width: 8,
        ..Config::default()
    };
    for (rust, c) in [("Le32", "__le32"), ("Le64", "__le64")] {
        config.export.rename.insert(rust.into(), c.into());
    }
    let structs = ["config", "req", "extent", "resp", "op_counters", "counters"];
    config.export.include = structs.iter().map(|s| format!("virtio_hmm_{s}")).collect();
    let mut header = Vec::new();
    Builder::new()
        .with_src(crate_dir.join("src/abi.rs"))
        .with_config(config)
        .generate()
        .expect("src/abi.rs is understood by cbindgen")
        .write(&mut header);
    kernel_style(&String::from_utf8(header).unwrap())
}

/// Gives cbindgen's output the kernel's types, tabs and kernel-doc comments.
fn kernel_style(header: &str) -> String {
    let mut out = String::new();
    let mut doc: Option<Vec<String>> = None;
    for line in header.lines() {
        let code = line.trim();
        if code == "/**" {
            doc = Some(Vec::new());
        } else if let Some(lines) = doc.as_mut().filter(|_| code.starts_with('*')) {
            if code != "*/" {
                let text = code.trim_start_matches('*').trim();
                lines.push(text.replace(['`', '[', ']'], "").replace("::", "."));
            }
        } else {
            let (indent, code) = match line.strip_prefix("        ") {
                Some(field) => ("\t", field),
                None => ("", line),
            };
            if let Some(doc) = doc.take() {
                out.push_str(&comment(indent, code, &doc));
            }
            let code = code
                .replace("uint8_t", "__u8")
                .replace("#endif  ", "#endif ");
            out.push_str(&format!("{indent}{code}\n"));
        }
    }
    out
}

/// The comment `doc` of the declaration `code`.
fn comment(indent: &str, code: &str, doc: &[String]) -> String {
    let declared = code.trim_end_matches([';', '{', ' ']);
    let text = doc.join(" ");
    let text = if code.starts_with("#define") {
        return block(indent, "/*", &text);
    } else if code.starts_with("struct") && code.ends_with('{') {
        let (brief, rest) = text
            .split_once(". ")
            .unwrap_or((text.trim_end_matches('.'), ""));
        let rest = if rest.is_empty() {
            String::new()
        } else {
            format!("\n\n{rest}")
        };
        format!("{declared} - {brief}{rest}")
    } else {
        let name = declared.rsplit(' ').next().unwrap();
        format!("@{}: {text}", name.split('[').next().unwrap())
    };
    block(indent, "/**", &text)
}

/// `text` as a comment of lines that end before column 80.
fn block(indent: &str, open: &str, text: &str) -> String {
    let single = format!("{indent}{open} {text} */\n");
    if indent.is_empty() == (open == "/*") && !text.contains('\n') && single.len() < 73 {
        return single;
    }
    let mut out = format!("{indent}{open}\n");
    for paragraph in text.split('\n') {
        let mut line = format!("{indent} *");
        for word in paragraph.split(' ') {
            if line.len() + word.len() > 71 {
                out.push_str(&format!("{line}\n"));
                line = format!("{indent} *");
            }
            line.push_str(&format!(" {word}"));
        }
        out.push_str(&format!("{}\n", line.trim_end()));
    }
    out.push_str(&format!("{indent} */\n"));
    out
}

#[test]
fn committed_header_matches_the_rust_definitions() {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = crate_dir.join("../guest-driver/include/virtio_hmm_abi.h");
    let generated = generate(crate_dir);
    if env::var_os(UPDATE).is_some() {
        fs::write(&path, &generated).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == generated,
        "{} differs from device/src/abi.rs; run this test with {UPDATE}=1 to rewrite it",
        path.display(),
    );
}
