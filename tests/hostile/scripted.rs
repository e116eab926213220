//! A plaintext server of few words, a shell script, for tests of who is put off and told what was learned.

use std::fs;
use std::path::Path;

/// A server of few words. It greets with the file `greeting`, and writes down each client that it is started for.
pub(crate) const SERVER: &str = r#"
echo "$TCPREMOTEIP" >> "$1/started"
. "$1/greeting"
CR=$(printf '\r')
while IFS= read -r line; do
    line=${line%"$CR"}
    echo "$line" >> "$1/heard"
    case $line in
        EHLO*) printf '250-mx hello %s [%s]\r\n250 SIZE 9\r\n' "${line#EHLO }" "$TCPREMOTEIP" ;;
        QUIT) printf '221 bye\r\n'; exit ;;
        *) printf '250 %s\r\n' "$line" ;;
    esac
done
"#;

/// It greets so.
pub(crate) const GREETING: &str = "printf '220 mx\\r\\n'";

/// What it has written down of this.
pub(crate) fn lines(folder: &Path, name: &str) -> Vec<String> {
    let text = fs::read_to_string(folder.join(name)).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}
