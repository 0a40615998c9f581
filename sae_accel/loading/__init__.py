"""Where trained heads come from. A folder, a file or a repo on the Hub comes in; heads by name go out."""
