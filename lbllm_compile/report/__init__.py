"""What people read: progress, tables and graph views on a terminal."""
