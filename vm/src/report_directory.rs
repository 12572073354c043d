//! Where `--report DIR` puts a result.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::error::{FileContext, Result};
use crate::page::Pages;
use crate::report::Report;

/// A directory that can be written.
#[derive(Debug)]
pub struct ReportDirectory(PathBuf);

impl ReportDirectory {
    /// Makes it if it is not there, and sees that files can be made in it.
    ///
    /// # Errors
    /// It is a file, or cannot be made or written.
    pub fn open(path: &Path) -> Result<Self> {
        fs::create_dir_all(path).at("create the report's directory", path)?;
        let directory = Self(path.to_path_buf());
        directory.temporary().map(|_| directory)
    }

    /// Writes the pages in place of those that may be there, and tells the user where. Each file
    /// is replaced as a whole or stays.
    ///
    /// # Errors
    /// There is no space for them, or the directory can be written no more.
    pub fn write(&self, pages: &Pages) -> Result<()> {
        let files = [("report.json", &pages.json), ("report.html", &pages.html)];
        let written = files.map(|(name, text)| {
            let path = self.0.join(name);
            let mut file = self.temporary()?;
            file.write_all(text.as_bytes()).at("write", &path)?;
            Ok((file, path))
        });
        // None takes its place unless all can.
        for (file, path) in written.into_iter().collect::<Result<Vec<_>>>()? {
            file.persist(&path).at("write", &path)?;
        }
        let page = self.0.join("report.html");
        Report.line(&format!("the report is {}", page.display()));
        Ok(())
    }

    fn temporary(&self) -> Result<NamedTempFile> {
        let mut builder = tempfile::Builder::new();
        // Less what the user's umask takes away.
        builder
            .prefix(".report-")
            .permissions(Permissions::from_mode(0o666));
        builder.tempfile_in(&self.0).at("write into", &self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(text: &str) -> Pages {
        Pages {
            html: text.into(),
            json: text.into(),
        }
    }

    #[test]
    fn a_report_replaces_the_one_before() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("a/b");
        for text in ["first", "second"] {
            let directory = ReportDirectory::open(&path).unwrap();
            directory.write(&pages(text)).unwrap();
            for name in ["report.html", "report.json"] {
                assert_eq!(fs::read_to_string(path.join(name)).unwrap(), text);
            }
        }
        let mut names: Vec<_> = fs::read_dir(&path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["report.html", "report.json"]);
    }

    #[test]
    fn a_file_is_no_directory() {
        let file = NamedTempFile::new().unwrap();
        let error = ReportDirectory::open(file.path()).unwrap_err().to_string();
        assert!(error.contains("create the report's directory"), "{error}");
        let error = ReportDirectory::open(&file.path().join("below")).unwrap_err();
        assert!(error.to_string().contains("below"));
    }

    #[test]
    fn what_is_there_stays_when_the_report_cannot_be_written() {
        let parent = tempfile::tempdir().unwrap();
        let directory = ReportDirectory::open(&parent.path().join("there")).unwrap();
        fs::remove_dir(&directory.0).unwrap();
        assert!(directory.write(&pages("page")).is_err());
    }
}
