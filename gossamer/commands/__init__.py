"""The commands, by part: each parses, calls one public function of the same parameter names, and prints."""
